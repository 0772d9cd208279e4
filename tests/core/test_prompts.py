"""Prompt sets: what is read, and that sets are disjoint, ordered and stable; shipped; COCO."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdiff_core import coco, prompts
from crdiff_core.coco import CocoCaptions, sample_captions
from crdiff_core.errors import PromptError
from crdiff_core.prompts import (
    PROMPT_LISTS,
    Prompt,
    PromptSet,
    noise_seed,
    read_texts,
    shipped_texts,
    split_prompts,
)

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
        "add prompts, lower prompts.search, prompts.rerank or prompts.validation, or set "
        "prompts.repeat=true"
    )


def test_tags_name_the_set_and_the_place_in_it():
    sets = split_prompts(["a", "b"], {"search": 2}, 0, "file")
    assert [prompt.tag for prompt in sets["search"].prompts] == ["search-000", "search-001"]


# Using texts again

SOME_TEXTS = st.lists(st.text(max_size=3), min_size=1, max_size=5, unique=True)
SIZES = st.tuples(*[st.integers(0, 9)] * 3)


def repeated(texts, sizes, seed=0):
    named = dict(zip(["search", "rerank", "validation"], sizes, strict=True))
    return split_prompts(texts, named, seed, "file", repeat=True)


@given(texts=SOME_TEXTS, sizes=SIZES, seed=st.integers(0, 9))
def test_repeated_texts_share_no_noise_and_no_tag(texts, sizes, seed):
    sets = repeated(texts, sizes, seed)
    assert tuple(len(part) for part in sets.values()) == sizes
    all_prompts = [prompt for part in sets.values() for prompt in part.prompts]
    assert len({(prompt.text, prompt.seed) for prompt in all_prompts}) == sum(sizes)
    assert len({prompt.tag for prompt in all_prompts}) == sum(sizes)


@given(texts=SOME_TEXTS, sizes=SIZES)
def test_repeated_texts_go_round(texts, sizes):
    sets = repeated(texts, sizes)
    cut = [prompt.text for part in sets.values() for prompt in part.prompts]
    assert cut == [texts[index % len(texts)] for index in range(sum(sizes))]


@given(texts=SOME_TEXTS, rounds=st.integers(1, 4), before=st.integers(0, 9))
def test_a_set_of_whole_rounds_has_each_text_equally_often(texts, rounds, before):
    sets = repeated(texts, (before, rounds * len(texts), 0))
    counts = Counter(prompt.text for prompt in sets["rerank"].prompts)
    assert counts == dict.fromkeys(texts, rounds)


@given(texts=SOME_TEXTS, sizes=SIZES, more=st.integers(1, 9))
def test_a_longer_set_changes_nothing_before_it(texts, sizes, more):
    search, rerank, validation = sizes
    short, long = repeated(texts, sizes), repeated(texts, (search, rerank, validation + more))
    assert (long["search"], long["rerank"]) == (short["search"], short["rerank"])
    assert long["validation"].prompts[:validation] == short["validation"].prompts


@given(
    texts=st.lists(st.text(max_size=3), min_size=12, max_size=20),
    sizes=st.tuples(*[st.integers(0, 4)] * 3),
    seed=st.integers(0, 2**31),
)
def test_what_need_not_be_repeated_is_what_it_always_was(texts, sizes, seed):
    distinct = list(dict.fromkeys(texts))
    sizes = tuple(min(size, len(distinct) // 3) for size in sizes)
    named = dict(zip(["search", "rerank", "validation"], sizes, strict=True))
    # As it was before there was a repetition.
    expected, rest = {}, distinct
    for name, size in named.items():
        part, rest = rest[:size], rest[size:]
        rows = []
        for index, text in enumerate(part):
            digest = hashlib.sha256(f"{seed} {text}".encode()).digest()
            noise = int.from_bytes(digest[:4], "big") >> 1
            rows.append(Prompt(text, f"{name}-{index:03d}", noise))
        expected[name] = PromptSet(name, tuple(rows))
    assert split_prompts(texts, named, seed, "file") == expected
    assert split_prompts(texts, named, seed, "file", repeat=True) == expected


def test_one_text_has_a_seed_for_each_repetition():
    sets = split_prompts(["a"], {"search": 2, "validation": 1}, 5, "file", repeat=True)
    search, validation = sets["search"].prompts, sets["validation"].prompts
    assert search[0] == Prompt("a", "search-000", noise_seed("a", 5))
    assert search[1] == Prompt("a", "search-001", noise_seed("a", 5, 1))
    assert validation == (Prompt("a", "validation-000", noise_seed("a", 5, 2)),)


def test_a_repetitions_seed_never_changes():
    assert noise_seed("a red circle", 0, 1) == 1279540059
    assert noise_seed("a red circle", 0, 2) == 417130483


def test_equal_hashes_of_one_text_do_not_give_equal_seeds():
    num = 150_000
    hashes = [noise_seed("a", 0, repetition) for repetition in range(num)]
    assert len(set(hashes)) < num, "without an equal pair this test would show nothing"
    rows = split_prompts(["a"], {"search": num}, 0, "file", repeat=True)["search"].prompts
    assert len({row.seed for row in rows}) == num
    first, moved = set(), []
    for row, raw in zip(rows, hashes, strict=True):
        if raw in first:
            moved.append((row.seed, raw))
        else:
            assert row.seed == raw
        first.add(raw)
    assert moved == [(raw + 1, raw) for _, raw in moved]


def test_a_seed_in_the_way_is_passed_and_the_last_is_followed_by_zero(monkeypatch):
    hashes = iter([2**31 - 1, 2**31 - 1, 0, 2**31 - 1])
    monkeypatch.setattr(prompts, "noise_seed", lambda *_: next(hashes))
    rows = split_prompts(["a"], {"search": 4}, 0, "file", repeat=True)["search"].prompts
    assert [row.seed for row in rows] == [2**31 - 1, 0, 1, 2]


def test_different_texts_may_have_the_same_noise(monkeypatch):
    monkeypatch.setattr(prompts, "noise_seed", lambda *_: 7)
    rows = split_prompts(["a", "b"], {"search": 4}, 0, "file", repeat=True)["search"].prompts
    assert [(row.text, row.seed) for row in rows] == [("a", 7), ("b", 7), ("a", 8), ("b", 8)]


def test_shared_noise_is_that_of_the_seed_and_in_later_rounds_of_the_next():
    sizes = {"search": 2, "rerank": 3}
    sets = split_prompts(["a", "b"], sizes, 24432, "file", repeat=True, shared_noise=True)
    rows = [(p.text, p.seed) for each in sets.values() for p in each.prompts]

    assert rows == [("a", 24432), ("b", 24432), ("a", 24433), ("b", 24433), ("a", 24434)]


def test_there_must_be_a_text_to_repeat():
    with pytest.raises(PromptError, match=r"p.txt has 0 distinct prompts and 2 search are needed"):
        split_prompts([], {"search": 2}, 0, "p.txt", repeat=True)


def test_nothing_asked_for_is_nothing_cut():
    assert len(split_prompts([], {"search": 0}, 0, "p.txt", repeat=True)["search"]) == 0


# Shipped lists


def test_the_references_prompts_are_its_own():
    assert shipped_texts("reference") == [
        "A cat holding a sign that says hello world",
        "A billboard in Times Square showing the text 'FUTURE IS NOW' in bold neon letters",
    ]


def test_an_unknown_list_is_refused():
    with pytest.raises(PromptError) as caught:
        shipped_texts("drawbench")
    assert str(caught.value) == "prompt list 'drawbench' is unknown: choose reference or everyday"


@pytest.mark.parametrize("name", PROMPT_LISTS)
def test_a_shipped_list_is_plain_text_one_prompt_a_line(name):
    content = PROMPT_LISTS[name].read_bytes()
    assert content.endswith(b"\n")
    assert re.fullmatch(rb"(?:[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?\n)+", content)
    assert content.decode().splitlines() == shipped_texts(name)


def test_the_everyday_list_has_200_different_prompts():
    assert len({text.casefold() for text in shipped_texts("everyday")}) == 200


def test_everyday_prompts_are_short_and_long_within_clips_77_tokens():
    texts = shipped_texts("everyday")
    lengths = [len(text) for text in texts]
    assert min(lengths) >= 10
    assert max(lengths) <= 250
    assert sum(length < 30 for length in lengths) >= 5
    assert sum(length > 80 for length in lengths) >= 10
    assert max(len(re.findall(r"\w+|[^\w\s]", text)) for text in texts) <= 60
    assert all("  " not in text for text in texts)


def test_everyday_prompts_are_no_template():
    texts = shipped_texts("everyday")
    assert len({text.split()[0].casefold() for text in texts}) >= 50
    starts = Counter(tuple(text.casefold().split()[:3]) for text in texts)
    assert max(starts.values()) <= 2


def test_no_two_everyday_prompts_are_nearly_the_same():
    little = set("a an and at by from in into its of on one the to two under with".split())
    words = {
        text: set(re.findall(r"[a-z]+", text.casefold())) - little
        for text in shipped_texts("everyday")
    }
    for (one, here), (other, there) in combinations(words.items(), 2):
        assert len(here & there) <= len(here | there) / 3, (one, other)


# COCO

NUM_IMAGES = 40


def coco_content(num_images=NUM_IMAGES):
    """Make what captions_val2014.json holds, with 5 to 7 captions of each image, shuffled."""
    shuffled = random.Random(1)
    ids = shuffled.sample(range(1, 600_000), num_images)
    images = [
        {
            "license": 3,
            "file_name": f"COCO_val2014_{image_id:012d}.jpg",
            "coco_url": f"http://images.example/{image_id}.jpg",
            "height": 480,
            "width": 640,
            "id": image_id,
        }
        for image_id in ids
    ]
    annotations = [
        {"image_id": image_id, "id": 10 * index + k, "caption": f"Caption {k} of {image_id}. "}
        for index, image_id in enumerate(ids)
        for k in range(5 + index % 3)
    ]
    shuffled.shuffle(annotations)
    return {
        "info": {"description": "made by a test"},
        "images": images,
        "licenses": [{"id": 3, "name": "none"}],
        "annotations": annotations,
    }


@pytest.fixture
def captions_file(tmp_path):
    return write(tmp_path / "captions_val2014.json", json.dumps(coco_content()))


@pytest.fixture
def images(tmp_path):
    """The folder of all images; each has its own bytes."""
    folder = tmp_path / "val2014"
    folder.mkdir()
    for image in coco_content()["images"]:
        (folder / image["file_name"]).write_bytes(jpeg(image["id"]))
    return folder


def jpeg(image_id):
    return b"\xff\xd8" + random.Random(image_id).randbytes(500) + b"\xff\xd9"


def as_the_reference_draws(content, num, seed):
    """Draw (image id, caption) as the reference does, with the random module's own state."""
    state = random.getstate()
    try:
        random.seed(seed)
        captions = {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        chosen = random.sample(list(captions.keys()), num)
        return [(image_id, random.choice(captions[image_id])) for image_id in chosen]
    finally:
        random.setstate(state)


def call(capsys, *arguments):
    """Run the command; its exit code and what it wrote."""
    try:
        code = prompts.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        code = stopped.code
    written = capsys.readouterr()
    return code, written.out, written.err


@pytest.mark.parametrize(("num", "seed"), [(1, 42), (15, 42), (NUM_IMAGES, 42), (15, 0), (15, 7)])
def test_the_subset_is_the_one_that_the_reference_draws(
    capsys, tmp_path, captions_file, num, seed
):
    out = tmp_path / "coco.parquet"
    code, said, _ = call(
        *(capsys, "coco", "--captions", captions_file, "--out", out),
        *("--num", num, "--seed", seed),
    )
    assert (code, said) == (0, f"{out}\n")
    table = pq.read_table(out)
    assert table.column_names == ["prompt", "image_id", "file_name"]
    rows = list(zip(table["image_id"].to_pylist(), table["prompt"].to_pylist(), strict=True))
    assert rows == as_the_reference_draws(coco_content(), num, seed)
    names = [f"COCO_val2014_{image_id:012d}.jpg" for image_id, _ in rows]
    assert table["file_name"].to_pylist() == names


def test_the_subset_of_all_of_cocos_size_is_the_references():
    content = coco_content(40_504)
    by_image = {}
    for annotation in content["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation["caption"])
    names = {image["id"]: image["file_name"] for image in content["images"]}
    found = sample_captions(CocoCaptions(Path("captions_val2014.json"), "", by_image, names))
    rows = [(prompt.image_id, prompt.text) for prompt in found]
    assert rows == as_the_reference_draws(content, 5000, 42)


def test_the_defaults_are_the_papers(captions_file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = prompts._parser().parse_args(["coco", "--captions", str(captions_file)])
    assert (options.num, options.seed, options.out) == (5000, 42, Path("coco5k.parquet"))
    assert options.images is None


def test_sampling_leaves_the_random_modules_state_alone(captions_file):
    state = random.getstate()
    sample_captions(CocoCaptions.read(captions_file), 5)
    assert random.getstate() == state


def test_images_travel_in_the_file(capsys, tmp_path, captions_file, images, monkeypatch):
    monkeypatch.setattr(coco, "_ROWS", 4)
    out = tmp_path / "coco.parquet"
    arguments = ("--captions", captions_file, "--images", images, "--out", out, "--num", 10)
    assert call(capsys, "coco", *arguments)[0] == 0
    rows = pq.read_table(out).to_pylist()
    assert len(rows) == 10
    assert pq.ParquetFile(out).num_row_groups == 3
    for row in rows:
        assert list(row) == ["prompt", "image_id", "file_name", "image"]
        assert row["image"] == jpeg(row["image_id"])


def test_the_prompts_are_read_without_the_images(capsys, tmp_path, captions_file, images):
    out = tmp_path / "coco.parquet"
    arguments = ("--captions", captions_file, "--images", images, "--out", out, "--num", 10)
    assert call(capsys, "coco", *arguments)[0] == 0
    whole = read_texts(out)
    assert whole == [text.strip() for text in pq.read_table(out)["prompt"].to_pylist()]
    # With the images' part of the file wiped out, only who reads that notices.
    column = pq.read_metadata(out).row_group(0).column(3)
    assert column.path_in_schema == "image"
    content = bytearray(out.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    out.write_bytes(content)
    with pytest.raises((OSError, pa.ArrowInvalid)):
        pq.read_table(out)
    assert read_texts(out) == whole


def test_the_file_says_where_it_is_from(capsys, tmp_path, captions_file):
    out = tmp_path / "coco.parquet"
    assert call(capsys, "coco", "--captions", captions_file, "--out", out, "--num", 3)[0] == 0
    provenance = json.loads(pq.read_schema(out).metadata[b"provenance"])
    assert provenance.pop("sampling").startswith("random.Random(seed): sample(num) of the image")
    assert provenance == {
        "tool": "crdiff-search",
        "version": version("crdiff-search"),
        "source": "captions_val2014.json",
        "source_sha256": hashlib.sha256(captions_file.read_bytes()).hexdigest(),
        "num": 3,
        "seed": 42,
    }


def test_the_same_subset_is_the_same_file(capsys, tmp_path, captions_file, images):
    files = tmp_path / "a.parquet", tmp_path / "b.parquet"
    for out in files:
        arguments = ("--captions", captions_file, "--images", images, "--out", out, "--num", 9)
        assert call(capsys, "coco", *arguments)[0] == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_longer_wait_is_told(capsys, tmp_path, captions_file, monkeypatch):
    monkeypatch.setattr(coco, "_ROWS", 4)
    monkeypatch.setattr(coco, "_TELL_EVERY_S", 0.0)
    out = tmp_path / "coco.parquet"
    code, said, told = call(capsys, "coco", "--captions", captions_file, "--out", out, "--num", 10)
    assert (code, said) == (0, f"{out}\n")
    assert told == "4 of 10 written\n8 of 10 written\n10 of 10 written\n"


def test_a_short_wait_is_not(capsys, tmp_path, captions_file):
    out = tmp_path / "coco.parquet"
    assert call(capsys, "coco", "--captions", captions_file, "--out", out, "--num", 3)[2] == ""


def test_the_first_missing_image_is_named_before_anything_is_written(
    capsys, tmp_path, captions_file, images
):
    drawn = as_the_reference_draws(coco_content(), 10, 42)
    names = [f"COCO_val2014_{image_id:012d}.jpg" for image_id, _ in drawn]
    for name in names[3:5]:
        (images / name).unlink()
    out = tmp_path / "coco.parquet"
    arguments = ("--captions", captions_file, "--images", images, "--out", out, "--num", 10)
    code, said, told = call(capsys, "coco", *arguments)
    assert (code, said) == (2, "")
    assert told == (
        f"error: {images}: lacks {names[3]} and 1 more of 10 images: give the folder that "
        "val2014.zip unpacks to\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {captions_file.name, images.name}


def test_an_image_that_was_not_drawn_may_be_missing(capsys, tmp_path, captions_file, images):
    drawn = {image_id for image_id, _ in as_the_reference_draws(coco_content(), 10, 42)}
    for image in coco_content()["images"]:
        if image["id"] not in drawn:
            (images / image["file_name"]).unlink()
    out = tmp_path / "coco.parquet"
    arguments = ("--captions", captions_file, "--images", images, "--out", out, "--num", 10)
    assert call(capsys, "coco", *arguments)[0] == 0


def test_a_failure_half_way_leaves_the_former_file(
    capsys, tmp_path, captions_file, images, monkeypatch
):
    monkeypatch.setattr(coco, "_ROWS", 4)
    out = write(tmp_path / "coco.parquet", "the former file")
    last = as_the_reference_draws(coco_content(), 10, 42)[-1][0]
    read_bytes = Path.read_bytes

    def fail_at_last(path):
        if str(last) in path.name:
            raise OSError(5, "Input/output error", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", fail_at_last)
    arguments = ("--captions", captions_file, "--images", images, "--out", out, "--num", 10)
    code, _, told = call(capsys, "coco", *arguments)
    assert code == 2
    assert told.startswith("error: [Errno 5] Input/output error")
    assert out.read_text() == "the former file"
    assert {path.name for path in tmp_path.iterdir()} == {
        *(captions_file.name, images.name, out.name)
    }


def without(key):
    return {name: value for name, value in coco_content(2).items() if name != key}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory: give captions_val2014.json"),
        ("Caption 1.", "not JSON (Expecting value: line 1 column 1 (char 0)): download it again"),
        (b"\xff\xfe\xff", "not JSON ("),
        ("[" * 100_000, "not JSON ("),
        ([], "has no annotations: give captions_val2014.json"),
        (without("annotations"), "has no annotations: give captions_val2014.json"),
        ({"annotations": [], "images": []}, "has no annotations: give captions_val2014.json"),
        (without("images"), "has no images: give captions_val2014.json"),
        (
            {"annotations": [{"image_id": 1, "bbox": []}]},
            "annotations[0] has no image_id or no caption: give captions_val2014.json",
        ),
        (
            {**coco_content(2), "images": [{"id": True, "file_name": "a.jpg"}]},
            "images[0] has no id or no file_name: give captions_val2014.json",
        ),
        (
            coco_content(2),
            "has captions of 2 images and 3 are asked for: lower --num",
        ),
        (
            {**coco_content(3), "images": [{"id": 0, "file_name": "a.jpg"}]},
            "has captions and no place in the list of images: download it again",
        ),
    ],
    ids=[
        *("absent", "text", "binary", "deep", "a list", "no annotations", "empty", "no images"),
        *("other annotations", "other images", "few images", "unlisted image"),
    ],
)
def test_a_captions_file_that_is_none_is_refused_in_one_line(capsys, tmp_path, content, message):
    file = tmp_path / "captions.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        write(file, content if isinstance(content, str) else json.dumps(content))
    out = tmp_path / "coco.parquet"
    code, said, told = call(capsys, "coco", "--captions", file, "--out", out, "--num", 3)
    assert (code, said) == (2, "")
    assert told.startswith(f"error: {file}: ")
    assert message in told
    assert told.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND (--help"),
        ("flickr", "invalid choice: 'flickr'"),
        ("coco", "the following arguments are required: --captions (--help"),
        ("coco --captions FILE --num many", "invalid int value: 'many'"),
        ("coco --captions FILE --num 0", "--num 0: give at least 1"),
        ("coco --captions FILE --seed -1", "--seed -1: give at least 0"),
        ("coco --captions FILE --out TMP/c.csv", "not the name of a Parquet file: end it with"),
        ("coco --captions FILE --out TMP/no/c.parquet", "is not a folder you may write to"),
        ("coco --captions FILE --out FILE/c.parquet", "Not a directory"),
        ("coco --captions FILE --out TMP/d.parquet", "is a folder: give the name of a file"),
        ("coco --captions TMP", "Is a directory: give captions_val2014.json"),
        ("coco --captions FILE --images TMP/no", "TMP/no: is not a folder: give val2014/"),
        ("coco --captions FILE --images FILE", "is not a folder: give val2014/"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    capsys, tmp_path, captions_file, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.parquet").mkdir()
    here = {"TMP": str(tmp_path), "FILE": str(captions_file)}
    for name, value in here.items():
        arguments, message = arguments.replace(name, value), message.replace(name, value)
    few = ["--num", "3"] if "coco --c" in arguments and "--num" not in arguments else []
    code, said, told = call(capsys, *arguments.split(), *few)
    assert (code, said) == (2, "")
    assert told.startswith("error: ")
    assert message in told
    assert told.count("\n") == 1


def test_the_command_runs_as_a_module(tmp_path, captions_file):
    command = [sys.executable, "-W", "error", "-m", "crdiff_core.prompts", "coco"]
    done = subprocess.run(
        [*command, "--captions", captions_file.name, "--num", "4"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "coco5k.parquet\n", "")
    assert len(read_texts(tmp_path / "coco5k.parquet")) == 4


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


def test_the_digest_tells_texts_seeds_and_order_and_nothing_else():
    first, second = Prompt("a", "t", 1), Prompt("b", "t", 2)
    digest = PromptSet("search", (first, second)).digest
    assert PromptSet("rerank", (Prompt("a", "u", 1), second)).digest == digest
    for others in [(second, first), (first,), (first, Prompt("b", "t", 3)), (first, first)]:
        assert PromptSet("search", others).digest != digest
