"""Where each dataset row of the table of hostile inputs is tested: this table is the index, and its tests exist."""

from __future__ import annotations

import ast

import pytest
from django.conf import settings

FILES = "tests/workers/test_hostile_files.py"
REFUSED = f"{FILES}::test_a_file_that_cannot_be_read_is_refused_with_its_code"
BAD_ROW = f"{FILES}::test_a_bad_row_is_named_and_the_others_stay"
PAGES = "tests/hostile/test_pages.py"
DOWNLOADS = "tests/hostile/test_downloads.py"
TOKENS = "tests/hostile/test_control_tokens.py"
SAME = "tests/hostile/test_same_file.py"

ROWS: dict[int, tuple[str, list[str]]] = {
    1: ("empty file", [REFUSED]),
    2: ("only a header", [REFUSED]),
    3: ("a PNG, zip or program named .jsonl", [REFUSED]),
    4: ("a line that is cut", [BAD_ROW]),
    5: ("UTF-16, Latin-1, byte order mark", [REFUSED, BAD_ROW]),
    6: ("NUL in a text", [BAD_ROW]),
    7: ("a lone surrogate", [BAD_ROW]),
    8: ("NaN and Infinity", [BAD_ROW]),
    9: ("a key twice", [BAD_ROW]),
    10: ("200,000 nested lists", [BAD_ROW]),
    11: ("an integer of 5,000 digits", [BAD_ROW]),
    12: ("one line without an end", [f"{FILES}::test_a_line_of_200_mb_is_one_problem_in_flat_memory"]),
    13: ("millions of tiny rows", [f"{FILES}::test_many_tiny_rows_are_read_in_flat_memory"]),
    14: ("a gzip bomb", [REFUSED]),
    15: ("archives in archives", [REFUSED]),
    16: ("a zip with paths", [REFUSED]),
    17: ("a tar with links", [REFUSED]),
    18: ("a zip of many names", [REFUSED]),
    19: ("Parquet with a type that runs code", [REFUSED]),
    20: ("Parquet that expands", [REFUSED, f"{FILES}::test_a_parquet_bomb_is_refused_by_a_reader_that_stays_small"]),
    21: ("Parquet and gzip, cut off or damaged", [REFUSED]),
    22: ("CSV with too many columns, a huge cell, an open quote",
         [REFUSED, f"{FILES}::test_a_table_with_a_broken_row_names_its_line"]),
    23: ("CSV cells that are formulas", [
        f"{DOWNLOADS}::test_a_cell_that_begins_like_a_formula_is_text",
        f"{DOWNLOADS}::test_a_datasets_tables_prefix_formulas_and_its_file_keeps_them",
        f"{DOWNLOADS}::test_the_tables_of_adapters_and_jobs_prefix_formulas",
        f"{DOWNLOADS}::test_every_table_is_written_in_the_one_place_that_guards_cells"]),
    24: ("markup, templates, hx- attributes", [
        f"{PAGES}::test_the_pages_of_a_dataset_show_it_as_text",
        f"{PAGES}::test_what_is_learned_shows_it_token_by_token",
        f"{PAGES}::test_the_columns_of_a_table_and_its_rows_are_shown_as_text",
        f"{PAGES}::test_a_corrected_version_shows_before_and_after_as_text",
        f"{PAGES}::test_an_adapters_samples_suspicious_rows_and_blind_choices_show_it_as_text",
        f"{PAGES}::test_the_rows_of_a_suites_run_show_it_as_text",
        f"{PAGES}::test_answers_while_training_show_it_as_text",
        f"{PAGES}::test_a_reviews_blind_samples_and_threads_show_it_as_text",
        f"{PAGES}::test_in_a_real_browser_nothing_of_it_runs_or_is_asked_for"]),
    25: ("ANSI escapes, CR and LF, direction overrides, zero width", [
        f"{PAGES}::test_the_pages_of_a_dataset_show_it_as_text",
        "tests/studio/test_hidden_characters.py::test_hidden_characters_are_written_out",
        "tests/studio/test_hidden_characters.py::test_nobodys_text_makes_a_second_log_entry_or_steers_a_terminal",
        "tests/studio/test_hidden_characters.py::test_every_process_logs_in_that_form"]),
    26: ("unknown roles, no answer, two systems", [
        BAD_ROW, "tests/workers/formats/test_formats.py::test_a_conversation_that_teaches_nothing_is_an_error",
        "tests/workers/formats/test_formats.py::test_an_unknown_role_gets_the_nearest_one"]),
    27: ("special tokens in a text", [
        f"{TOKENS}::test_training_reads_them_as_characters",
        f"{TOKENS}::test_scoring_and_generation_read_them_as_characters",
        f"{TOKENS}::test_the_preview_shows_the_ids_of_training_and_the_dataset_page_warns_with_a_count"]),
    28: ("rows over the maximum length", [
        "tests/studio/datasets/test_inspecting.py::test_it_lists_the_longest_rows_with_their_lines",
        "tests/jobs/test_estimating.py::"
        "test_long_rows_are_cut_or_left_out_as_the_recipe_says_and_the_plan_counts_them",
        "tests/workers/test_batching.py::"
        "test_rows_that_are_too_long_are_left_out_with_their_lines_when_that_is_asked_for",
        "tests/workers/test_training.py::"
        "test_rows_over_the_length_are_cut_or_left_out_as_the_recipe_says_and_never_in_silence"]),
    29: ("the same file twice", [
        "tests/studio/datasets/test_uploads.py::test_the_same_file_is_stored_once_per_team",
        f"{SAME}::test_the_team_that_has_it_is_told_and_another_gets_what_a_new_file_gets",
        f"{SAME}::test_in_pieces_the_digest_announced_beforehand_saves_nobody_a_byte",
        f"{SAME}::test_the_same_work_is_done_for_a_file_that_another_team_has"]),
    30: ("a wrong declared sha256", [
        "tests/studio/datasets/test_tus.py::test_a_file_that_is_not_the_one_announced_is_refused",
        "tests/studio/datasets/test_tus.py::test_a_wrong_checksum_is_460_and_its_bytes_are_thrown_away"]),
    31: ("file names with paths, line breaks, 4,000 characters, CON, emoji", [
        "tests/studio/datasets/test_uploads.py::test_it_cleans_file_names",
        f"{DOWNLOADS}::test_a_file_is_stored_by_its_digest_and_comes_back_with_a_clean_name_in_its_header"]),
}  # fmt: skip


def test_the_index_has_every_row() -> None:
    assert list(ROWS) == list(range(1, 32))


@pytest.mark.parametrize("row", ROWS)
def test_the_tests_of_a_row_exist(row: int) -> None:
    _, tests = ROWS[row]
    assert tests
    for one in tests:
        path, _, name = one.partition("::")
        tree = ast.parse((settings.ROOT / path).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, one


@pytest.mark.parametrize("row", range(1, 23))
def test_the_files_of_a_row_are_among_the_cases_of_its_test(row: int) -> None:
    # Those tests run over tables of cases, whose names begin with the row's number.
    from tests.workers import test_hostile_files

    _, tests = ROWS[row]
    cases = [*test_hostile_files.REFUSED, *test_hostile_files.ROWS]
    if REFUSED in tests or BAD_ROW in tests:
        assert any(case.split(" ")[0] == str(row) for case in cases)
