"""Prompt sets: what is read, and that sets are disjoint, ordered and stable."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdiff_core.errors import PromptError
from crdiff_core.prompts import Prompt, PromptSet, noise_seed, read_texts, split_prompts

TEXTS = ["a red circle", "a blue square, small", 'a "green" star', "été à Zürich"]


def write(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.write_text(content, encoding=encoding)
    return path


def as_csv(texts: list[str], column: str = "prompt") -> str:
    quoted = ('"{}"'.format(text.replace('"', '""')) for text in texts)
    return "\r\n".join([f"id,{column}", *(f"{i},{text}" for i, text in enumerate(quoted))])


def as_parquet(path: Path, **columns: list[object]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


# Reading


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"], ids=["plain", "BOM"])
def test_text_is_read_line_by_line(tmp_path, encoding):
    assert read_texts(write(tmp_path / "p.txt", "\n".join(TEXTS), encoding)) == TEXTS


@pytest.mark.parametrize("column", ["prompt", "caption"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"], ids=["plain", "BOM"])
def test_csv_is_read_by_its_column(tmp_path, column, encoding):
    assert read_texts(write(tmp_path / "p.csv", as_csv(TEXTS, column), encoding)) == TEXTS


def test_a_byte_order_mark_does_not_hide_the_first_column(tmp_path):
    assert read_texts(write(tmp_path / "p.csv", "prompt\na cat\n", "utf-8-sig")) == ["a cat"]


@pytest.mark.parametrize("column", ["prompt", "caption"])
def test_parquet_is_read_by_its_column(tmp_path, column):
    numbers = list(range(len(TEXTS)))
    path = as_parquet(tmp_path / "p.parquet", **{"id": numbers, column: TEXTS})
    assert read_texts(path) == TEXTS


def test_the_prompt_column_wins_over_the_caption_column(tmp_path):
    assert read_texts(write(tmp_path / "p.csv", "caption,prompt\nno,yes\n")) == ["yes"]


@pytest.mark.parametrize("name", ["P.CSV", "p.Csv"])
def test_the_endings_case_does_not_matter(tmp_path, name):
    assert read_texts(write(tmp_path / name, as_csv(TEXTS))) == TEXTS


def test_blank_lines_and_margins_are_dropped(tmp_path):
    path = write(tmp_path / "p.txt", "\n  a cat \n\n\t\na dog\n\n")
    assert read_texts(path) == ["a cat", "a dog"]


def test_a_csv_row_without_its_prompt_is_skipped(tmp_path):
    assert read_texts(write(tmp_path / "p.csv", "id,prompt\n1,a cat\n2\n3,\n")) == ["a cat"]


def test_a_parquet_null_is_skipped(tmp_path):
    path = as_parquet(tmp_path / "p.parquet", prompt=["a cat", None])
    assert read_texts(path) == ["a cat"]


# What cannot be read


@pytest.mark.parametrize("content", ["", "\n\n", "  \n\t\n"], ids=repr)
def test_an_empty_text_file_is_refused(tmp_path, content):
    with pytest.raises(PromptError, match=r"p.txt: holds no prompt: write one prompt a line$"):
        read_texts(write(tmp_path / "p.txt", content))


def test_a_csv_of_headings_only_is_refused(tmp_path):
    with pytest.raises(PromptError, match="holds no prompt"):
        read_texts(write(tmp_path / "p.csv", "id,prompt\n"))


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    with pytest.raises(PromptError, match="holds no prompt"):
        read_texts(path)


@pytest.mark.parametrize("content", ["", "id,text\n1,a cat\n"], ids=["empty", "other columns"])
def test_a_csv_without_a_prompt_column_is_refused(tmp_path, content):
    with pytest.raises(PromptError, match=r"has the columns \[.*\]: name one of them prompt"):
        read_texts(write(tmp_path / "p.csv", content))


def test_a_parquet_file_without_a_prompt_column_is_refused(tmp_path):
    with pytest.raises(PromptError, match=r"has the columns \['text'\]: name one of them prompt"):
        read_texts(as_parquet(tmp_path / "p.parquet", text=TEXTS))


@pytest.mark.parametrize("heading", [True, False], ids=["heading", "row"])
def test_a_csv_field_beyond_all_bounds_is_refused(tmp_path, heading):
    endless = "a" * 200_000
    content = f"prompt,{endless}\n" if heading else f"prompt\na cat\n{endless}\n"
    with pytest.raises(PromptError, match=r"line \d: field larger than field limit"):
        read_texts(write(tmp_path / "p.csv", content))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(PromptError, match=r"No such file or directory: set prompts.path"):
        read_texts(tmp_path / "absent.txt")


@pytest.mark.parametrize("name", ["p.txt", "p.csv"])
def test_a_file_that_is_not_utf8_is_refused(tmp_path, name):
    path = write(tmp_path / name, "prompt\nété\n", "latin-1")
    with pytest.raises(PromptError, match=r"not UTF-8 text .*: save it as UTF-8"):
        read_texts(path)


def test_text_under_parquets_name_is_refused(tmp_path):
    with pytest.raises(PromptError, match="not Parquet"):
        read_texts(write(tmp_path / "p.parquet", "a cat\n"))


# Splitting into sets


@given(
    texts=st.lists(st.text(max_size=3), min_size=12, max_size=30, unique=True),
    sizes=st.tuples(*[st.integers(0, 4)] * 3),
    seed=st.integers(0, 9),
)
def test_sets_are_disjoint_in_order_and_of_the_sizes_asked_for(texts, sizes, seed):
    named = dict(zip(["search", "rerank", "validation"], sizes, strict=True))
    sets = split_prompts(texts, named, seed, "file")
    assert {name: len(part) for name, part in sets.items()} == named
    cut = [prompt.text for part in sets.values() for prompt in part.prompts]
    assert cut == texts[: sum(sizes)]


def test_duplicates_count_once(tmp_path):
    sets = split_prompts(["a", "a", "b", "a", "c"], {"search": 2, "rerank": 1}, 0, "file")
    assert [prompt.text for prompt in sets["search"].prompts] == ["a", "b"]
    assert [prompt.text for prompt in sets["rerank"].prompts] == ["c"]


def test_too_few_distinct_prompts_are_refused():
    with pytest.raises(PromptError) as caught:
        split_prompts(["a", "b", "a", "b"], {"search": 2, "validation": 1}, 0, "p.txt")
    assert str(caught.value) == (
        "p.txt has 2 distinct prompts and 2 search + 1 validation are needed, all disjoint: "
        "add prompts, or lower prompts.search, prompts.rerank or prompts.validation"
    )


def test_tags_name_the_set_and_the_place_in_it():
    sets = split_prompts(["a", "b"], {"search": 2}, 0, "file")
    assert [prompt.tag for prompt in sets["search"].prompts] == ["search-000", "search-001"]


# Seeds


def test_a_prompts_noise_seed_is_what_it_always_was():
    assert noise_seed("a red circle", 0) == 1325980140
    assert noise_seed("a red circle", 1) == 1582250061


def test_a_prompts_noise_seed_depends_on_neither_its_set_nor_its_place():
    here = split_prompts(["a", "b", "c"], {"search": 3}, 5, "file")["search"].prompts[2]
    there = split_prompts(["x", "c"], {"rerank": 1, "validation": 1}, 5, "file")["validation"]
    assert here.seed == there.prompts[0].seed


@given(text=st.text(), seed=st.integers(0, 2**31))
def test_a_noise_seed_fits_every_generator(text, seed):
    assert 0 <= noise_seed(text, seed) < 2**31


# Batches and digest


def prompt_set(num: int) -> PromptSet:
    return PromptSet("search", tuple(Prompt(f"p{i}", f"t{i}", i) for i in range(num)))


@given(num=st.integers(0, 20), batch_size=st.integers(1, 8))
def test_batches_are_the_prompts_in_order_and_only_the_last_is_smaller(num, batch_size):
    batches = prompt_set(num).batches(batch_size)
    assert [prompt for batch in batches for prompt in batch] == list(prompt_set(num).prompts)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(0 < len(batch) <= batch_size for batch in batches[-1:])


def test_the_digest_tells_texts_seeds_and_order_and_nothing_else():
    first, second = Prompt("a", "t", 1), Prompt("b", "t", 2)
    digest = PromptSet("search", (first, second)).digest
    assert PromptSet("rerank", (Prompt("a", "u", 1), second)).digest == digest
    for others in [(second, first), (first,), (first, Prompt("b", "t", 3)), (first, first)]:
        assert PromptSet("search", others).digest != digest
