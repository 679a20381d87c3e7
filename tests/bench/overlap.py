"""How long it takes to look for held-out rows among training rows: `python -m tests.bench.overlap`."""

from __future__ import annotations

import argparse
import random
import resource
import time

from workers.examples import Example, Message
from workers.overlap import find_overlap


def made_rows(num: int, *, seed: int, first_line: int, num_words: int = 80) -> list[Example]:
    """Rows of words drawn as in a language, few often and many rarely (Zipf)."""
    random_ = random.Random(seed)
    words = [f"word{index}" for index in range(30_000)]
    weights = [1 / (index + 3) for index in range(len(words))]
    drawn = random_.choices(words, weights, k=num * num_words)
    system = Message("system", "You are a helpful assistant who answers in a few plain sentences.")
    found = []
    for index in range(num):
        text = drawn[index * num_words : (index + 1) * num_words]
        turns = (Message("user", " ".join(text[:50])), Message("assistant", " ".join(text[50:])))
        found.append(Example(first_line + index, (system, *turns)))
    return found


def main() -> None:
    """Prints seconds and what was found of the rows that were planted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--training", type=int, default=100_000)
    parser.add_argument("--scored", type=int, default=1000)
    parser.add_argument("--planted", type=int, default=50)
    chosen = parser.parse_args()
    training = made_rows(chosen.training, seed=1, first_line=1)
    scored = made_rows(chosen.scored - chosen.planted, seed=2, first_line=10**7)
    for index in range(chosen.planted):
        _, question, answer = training[index * (len(training) // max(chosen.planted, 1))].messages
        changed = question.content if index % 2 else question.content.replace(question.content.split()[9], "x", 1)
        scored.append(Example(2 * 10**7 + index, (Message("user", changed), answer)))
    started = time.perf_counter()
    found = find_overlap(scored, lambda: iter(training), num_training=len(training))
    seconds = time.perf_counter() - started
    print(
        f"{len(scored):,} rows against {len(training):,} training rows of 80 words: {seconds:.1f} s; "
        f"{found.num_exact} the same and {found.num_near} nearly so, of {chosen.planted} planted; "
        f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:,.0f} MiB"
    )


if __name__ == "__main__":
    main()
