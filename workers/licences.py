"""What the licences of a base model and of a dataset allow an adapter to be. A help for people, not legal advice.

Identifiers are those of model and dataset cards on the Hugging Face Hub (SPDX names in lower case, and names of model
licences such as `llama3.1`). Each entry names the clause that it was read from. Whether a model is an adaptation of
the data it was trained on is not settled (creativecommons.org/using-cc-licensed-works-for-ai-training): the rules here
take the careful reading, under which it is. A licence that is not in the table stays unknown.
"""

from __future__ import annotations

from dataclasses import dataclass

UNKNOWN = "unknown"
OTHER = "other"
"""Its terms are written down somewhere, and only a person can read them."""


@dataclass(frozen=True)
class Licence:
    """What of a licence's terms bears on a work made from the licensed one."""

    label: str
    source: str
    """Where the terms stand, with the clause that the flags were read from."""
    non_commercial: bool = False
    share_alike: bool = False
    """An adaptation that is shared must be under this licence."""
    no_derivatives: bool = False
    """An adaptation must not be shared."""
    own_terms: bool = False
    """A licence for models: whatever is derived from the model stays under it."""
    note: str = ""
    """What sharing an adapter asks for beyond that."""


def _cc(letters: str, version: str, **flags: bool) -> Licence:
    clauses = [
        "section 3(a) attribution",
        *(["section 2(a)(1) non-commercial purposes"] if flags.get("non_commercial") else []),
        *(["section 3(b) share alike"] if flags.get("share_alike") else []),
        *(["section 2(a)(1)(B) adapted material not shared"] if flags.get("no_derivatives") else []),
    ]
    return Licence(
        f"CC {letters.upper()} {version}",
        f"creativecommons.org/licenses/{letters}/{version}/legalcode: {', '.join(clauses)}",
        note="Name the authors of the data.",
        **flags,
    )


LICENCES: dict[str, Licence] = {
    "apache-2.0": Licence(
        "Apache License 2.0",
        "apache.org/licenses/LICENSE-2.0: section 4, derivative works may have terms of their own",
        note="Keep its text and its notices.",
    ),
    "mit": Licence("MIT", "opensource.org/license/mit: the notice goes with every copy", note="Keep its notice."),
    "bsd-2-clause": Licence("BSD 2-Clause", "opensource.org/license/bsd-2-clause: conditions 1 and 2"),
    "bsd-3-clause": Licence("BSD 3-Clause", "opensource.org/license/bsd-3-clause: conditions 1 to 3"),
    "cc0-1.0": Licence("CC0 1.0", "creativecommons.org/publicdomain/zero/1.0/legalcode: section 2, waiver"),
    "unlicense": Licence("The Unlicense", "unlicense.org: dedication to the public domain"),
    "cdla-permissive-2.0": Licence(
        "CDLA Permissive 2.0", "cdla.dev/permissive-2-0: sections 3.1 and 5.4, results, models too, are free"
    ),
    "cc-by-4.0": _cc("by", "4.0"),
    "cc-by-sa-4.0": _cc("by-sa", "4.0", share_alike=True),
    "cc-by-nc-4.0": _cc("by-nc", "4.0", non_commercial=True),
    "cc-by-nc-sa-4.0": _cc("by-nc-sa", "4.0", non_commercial=True, share_alike=True),
    "cc-by-nd-4.0": _cc("by-nd", "4.0", no_derivatives=True),
    "cc-by-nc-nd-4.0": _cc("by-nc-nd", "4.0", non_commercial=True, no_derivatives=True),
    "llama3": Licence(
        "Llama 3 Community License", "llama.com/llama3/license: section 1.b, clauses i and iii", own_terms=True,
        note='Add its text and its notice, show "Built with Meta Llama 3", and begin the name with "Llama 3".',
    ),
    "llama3.1": Licence(
        "Llama 3.1 Community License", "llama.com/llama3_1/license: section 1.b, clauses i and iii", own_terms=True,
        note='Add its text and its notice, show "Built with Llama", and begin the adapter\'s name with "Llama".',
    ),
    "llama3.2": Licence(
        "Llama 3.2 Community License", "llama.com/llama3_2/license: section 1.b, clauses i and iii", own_terms=True,
        note='Add its text and its notice, show "Built with Llama", and begin the adapter\'s name with "Llama".',
    ),
    "gemma": Licence(
        "Gemma Terms of Use", "ai.google.dev/gemma/terms: sections 1.1(e) and 3.1, model derivatives (before Gemma 4)",
        own_terms=True,
        note="Add its text and its use restrictions, and say that the files were changed.",
    ),
}  # fmt: skip


def choices() -> list[tuple[str, str]]:
    """(identifier, label) of every licence that can be chosen, "unknown" first."""
    named = [(identifier, licence.label) for identifier, licence in LICENCES.items()]
    return [(UNKNOWN, "Not known"), *named, (OTHER, "Another one")]


def normalised(identifier: str) -> str:
    """An identifier as the Hub writes it; empty and "none" become "unknown"."""
    found = identifier.strip().lower().replace(" ", "-")
    return UNKNOWN if found in {"", "none", UNKNOWN} else found


def compatible(base_licence: str, dataset_licence: str) -> str | None:
    """None when an adapter of this base and this data may be shared; otherwise a sentence that says why not or what
    nobody knows. `adapter_licence` then says under which licence.
    """
    base_name, data_name = normalised(base_licence), normalised(dataset_licence)
    base, data = LICENCES.get(base_name), LICENCES.get(data_name)
    unknown = [
        f"that of the {what} is not known" if name == UNKNOWN else f'"{name}" of the {what} is none that is known here'
        for what, name, found in (("base model", base_name, base), ("dataset", data_name, data))
        if found is None
    ]
    if base is None or data is None:
        return f"The licences cannot be compared: {', and '.join(unknown)}. Somebody must read them."
    for what, licence in (("base model", base), ("dataset", data)):
        if licence.no_derivatives:
            return f"{licence.label} of the {what} does not allow what is made from it to be shared."
    if adapter_licence(base_name, data_name) == UNKNOWN:
        return (
            f"{base.label} of the base model and {data.label} of the dataset each ask for terms of their own, and no"
            " licence here keeps both. Somebody must read them."
        )
    return None


def adapter_licence(base_licence: str, dataset_licence: str) -> str:
    """The identifier under which the adapter may be shared; "unknown" where that does not follow from the table."""
    base_name, data_name = normalised(base_licence), normalised(dataset_licence)
    base, data = LICENCES.get(base_name), LICENCES.get(data_name)
    if base is None or data is None or base.no_derivatives or data.no_derivatives:
        return UNKNOWN
    # A name binds the adapter when it must stay under it, or when its limit on use goes on.
    binding = {
        name: licence
        for name, licence in ((base_name, base), (data_name, data))
        if licence.own_terms or licence.share_alike or licence.non_commercial
    }
    if not binding:
        return base_name
    if len(binding) == 1:
        return next(iter(binding))
    kept = [
        name
        for name, licence in binding.items()
        if all(_contains(licence, other) for other_name, other in binding.items() if other_name != name)
    ]
    return kept[0] if len(kept) == 1 else UNKNOWN


def _contains(licence: Licence, other: Licence) -> bool:
    """Whether sharing under `licence` also keeps what `other` asks for."""
    return not other.own_terms and not other.share_alike and (licence.non_commercial or not other.non_commercial)


def note_for(base_licence: str, dataset_licence: str) -> str:
    """What sharing the adapter asks for beyond its licence, as sentences; empty when that is nothing or unknown."""
    found = (LICENCES.get(normalised(one)) for one in (base_licence, dataset_licence))
    return " ".join(dict.fromkeys(licence.note for licence in found if licence and licence.note))
