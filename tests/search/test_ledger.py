import hashlib
import json
import logging
import re
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crdiff_core.evaluation import Measurement
from crdiff_core.prompts import Prompt
from crdiff_core.ratios import BlockRatios
from search.ledger import DRAWN_BY, SCHEMA, STAGES, Ledger, LedgerError
from search.storage import StorageError
from tests.search.landscapes import RECIPE

RATIOS = BlockRatios(0.3, 0.2, 0.1)
PROMPTS = (Prompt("a 'quoted' \n prompt 🎨", "p0", 7), Prompt("another", "p1", 8))
MEASURED = Measurement((0.25, -1.5), {"down": 0.3, "mid": 0.2, "up": 0.1}, {"render": 2.0}, 2)


def written(folder, outcome=MEASURED, **kwargs):
    ledger = Ledger(folder, **kwargs)
    ledger.append(RECIPE, RATIOS, PROMPTS, outcome)
    return ledger


def test_what_is_appended_is_read_back_by_another_ledger(tmp_path):
    written(tmp_path)
    entry = Ledger(tmp_path).get(RECIPE.key(RATIOS), PROMPTS[0])

    assert (entry.reward, entry.failure, entry.seconds) == (0.25, None, 1.0)
    assert entry.sparsity == MEASURED.sparsity


def test_rows_say_what_they_are_of(tmp_path):
    written(tmp_path)
    row = Ledger(tmp_path).table().to_pylist()[1]

    assert (row["prompt"], row["seed"], row["reward"]) == ("another", 8, -1.5)
    assert (row["down"], row["mid"], row["up"], row["poa_weight"]) == (0.3, 0.2, 0.1, 1.5)
    assert (row["model"], row["height"], row["width"]) == ("analytic", 24, 40)


@pytest.mark.parametrize("field", [field.name for field in fields(RECIPE)])
def test_every_part_of_the_recipe_is_part_of_the_key(field):
    value = getattr(RECIPE, field)
    other = value + "x" if isinstance(value, str) else "x" if value is None else value + 1
    changed = replace(RECIPE, **{field: other})

    assert changed.key(RATIOS) != RECIPE.key(RATIOS)


def test_another_seed_is_another_row(tmp_path):
    ledger = written(tmp_path)

    assert ledger.get(RECIPE.key(RATIOS), replace(PROMPTS[0], seed=9)) is None
    assert ledger.get(RECIPE.key(RATIOS), replace(PROMPTS[0], tag="renamed")) is not None


def test_a_failure_is_no_number(tmp_path):
    written(tmp_path, "CUDA out of memory")
    entry = Ledger(tmp_path).get(RECIPE.key(RATIOS), PROMPTS[0])

    assert (entry.reward, entry.failure) == (None, "CUDA out of memory")


def test_a_success_replaces_a_failure_but_not_the_other_way(tmp_path):
    written(tmp_path, "node lost")
    written(tmp_path)
    written(tmp_path, "node lost")

    assert Ledger(tmp_path).get(RECIPE.key(RATIOS), PROMPTS[0]).reward == 0.25


def test_retry_failed_forgets_failures(tmp_path):
    written(tmp_path, "node lost")

    assert Ledger(tmp_path, retry_failed=True).get(RECIPE.key(RATIOS), PROMPTS[0]) is None


def test_an_unfinished_draft_is_no_part_of_the_ledger(tmp_path):
    written(tmp_path)
    (tmp_path / ".20990101T000000-torn.parquet").write_bytes(b"PAR1 half a file")

    assert Ledger(tmp_path).table().num_rows == 2


def test_a_torn_file_is_left_out_with_a_warning(tmp_path, caplog):
    written(tmp_path)
    (tmp_path / "20990101T000000-torn.parquet").write_bytes(b"PAR1 half a file")

    with caplog.at_level(logging.WARNING):
        assert Ledger(tmp_path).table().num_rows == 2
    assert "torn.parquet cannot be read and is left out" in caplog.text


def test_a_parquet_file_of_others_is_left_out_with_a_warning(tmp_path, caplog):
    written(tmp_path)
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "other.parquet")

    assert Ledger(tmp_path).table().num_rows == 2
    assert "other.parquet is no ledger file and is left out" in caplog.text


def test_a_file_of_a_newer_version_is_refused_with_the_remedy(tmp_path):
    written(tmp_path)
    (file,) = tmp_path.iterdir()
    newer = SCHEMA.with_metadata({"crdiff_ledger_schema": "2"})
    pq.write_table(pq.read_table(file).cast(newer), file)

    with pytest.raises(LedgerError, match=r"^[^\n]*by a newer version of crdiff-search.*: update"):
        Ledger(tmp_path)


def test_files_carry_the_schema_version(tmp_path):
    written(tmp_path)
    file = next(tmp_path.glob("*.parquet"))

    assert pq.read_schema(file).metadata[b"crdiff_ledger_schema"] == b"1"
    assert pq.read_schema(file).names == SCHEMA.names


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageError, match=r"^[^\n]*set output to a place [^\n]*$"):
        Ledger(tmp_path / "file" / "ledger")


def test_a_write_that_fails_keeps_what_was_there_and_no_draft(tmp_path, monkeypatch):
    ledger = written(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device: free space there") as raised:
        ledger.append(RECIPE, BlockRatios(), PROMPTS, MEASURED)
    monkeypatch.undo()
    rescued = Path(re.search(r"just measured are in (\S+):", str(raised.value))[1])

    assert Ledger(tmp_path).table().num_rows == 2
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert ledger.get(RECIPE.key(BlockRatios()), PROMPTS[0]) is None

    for file in rescued.iterdir():
        shutil.move(file, tmp_path)
    rescued.rmdir()
    assert Ledger(tmp_path).get(RECIPE.key(BlockRatios()), PROMPTS[0]).reward == 0.25


def test_ledgers_from_before_some_columns_still_count(tmp_path):
    written(tmp_path)
    file = next(tmp_path.glob("*.parquet"))
    late = ["size_conditioning", "drawn_at", "negative_prompt", "memory_gib", "redrawn", *DRAWN_BY]
    late += [f"{stage}_seconds" for stage in STAGES]
    pq.write_table(pq.read_table(file).drop_columns(late), file)

    entry = Ledger(tmp_path).get(RECIPE.key(RATIOS), PROMPTS[0])
    assert (entry.reward, entry.stages, entry.memory_gib) == (0.25, {}, None)


def test_stages_and_memory_come_back_by_picture(tmp_path):
    seconds = {"prune": 0.5, "render": 3.0, "score": 1.0}
    written(tmp_path, replace(MEASURED, seconds=seconds, memory_gib=7.5))

    entry = Ledger(tmp_path).get(RECIPE.key(RATIOS), PROMPTS[1])
    assert entry.stages == {"prune": 0.25, "render": 1.5, "score": 0.5}
    assert (entry.seconds, entry.memory_gib) == (2.25, 7.5)


def test_the_key_is_of_what_a_reward_depended_on_at_first(tmp_path):
    parts = {**asdict(RECIPE), "ratios": RATIOS.as_dict()}
    for later in ("size_conditioning", "drawn_at", "negative_prompt", "batch_size"):
        del parts[later]
    expected = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    assert RECIPE.key(RATIOS) == expected


def test_the_empty_negative_prompt_is_another_key_than_the_pipelines_own():
    keys = {replace(RECIPE, negative_prompt=text).key(RATIOS) for text in (None, "", "blurry")}

    assert len(keys) == 3


# --- batches -------------------------------------------------------------------------------------


def test_rows_say_how_many_were_drawn_at_once(tmp_path):
    ledger = Ledger(tmp_path, own_batch_size=16)
    for recipe in (RECIPE, replace(RECIPE, batch_size=4)):
        ledger.append(recipe, RATIOS, PROMPTS, MEASURED)

    assert ledger.table()["batch_size"].to_pylist() == [16, 16, 4, 4]


def test_rows_from_before_it_was_part_of_the_key_are_known_by_their_batch_size(tmp_path):
    eight = replace(RATIOS, mid=0.3)
    for ratios, batch_size in ((RATIOS, 16), (eight, 8)):
        Ledger(tmp_path).append(RECIPE, ratios, PROMPTS, MEASURED)
        file = max(tmp_path.iterdir())
        rows = pq.read_table(file, schema=SCHEMA).drop_columns(["redrawn", *DRAWN_BY]).to_pylist()
        rows = [row | {"batch_size": batch_size} for row in rows]
        assert {row["key"] for row in rows} == {RECIPE.key(ratios)}
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)
    ledger = Ledger(tmp_path, own_batch_size=16)

    assert set(ledger.table()["key"].to_pylist()) == set(ledger.candidates)
    # Those of the model's own number are still called as they were.
    assert ledger.get(RECIPE.key(RATIOS), PROMPTS[0]).reward == 0.25
    assert ledger.get(RECIPE.key(eight), PROMPTS[0]) is None
    assert ledger.get(replace(RECIPE, batch_size=8).key(eight), PROMPTS[0]).reward == 0.25
    assert {each.ratios for each in ledger.candidates.values()} == {RATIOS, eight}


def test_the_models_own_number_may_change_without_mixing_rewards(tmp_path):
    Ledger(tmp_path, own_batch_size=4).append(RECIPE, RATIOS, PROMPTS, MEASURED)
    measured_since = Ledger(tmp_path, own_batch_size=8)

    assert measured_since.get(RECIPE.key(RATIOS), PROMPTS[0]) is None
    assert measured_since.get(replace(RECIPE, batch_size=4).key(RATIOS), PROMPTS[0]) is not None


def test_a_row_is_never_written_twice(tmp_path):
    ledger = written(tmp_path)

    assert ledger.append(RECIPE, RATIOS, PROMPTS, replace(MEASURED, rewards=(9.0, 9.0))) == 0
    third = Prompt("a third", "p2", 9)
    three = replace(MEASURED, rewards=(9.0, 9.0, 0.5), seconds={"render": 3.0})
    assert ledger.append(RECIPE, RATIOS, [*PROMPTS, third], three) == 1
    assert ledger.table()["reward"].to_pylist() == [0.25, -1.5, 0.5]
    # Whatever was dropped, what the batch took was paid.
    assert ledger.get(RECIPE.key(RATIOS), third).seconds == 3.0


def test_what_filled_a_batch_up_is_no_row(tmp_path):
    written(tmp_path, replace(MEASURED, rewards=(0.25, -1.5, -1.5)))

    assert Ledger(tmp_path).table().num_rows == 2


def test_rows_say_what_else_moves_their_digits(tmp_path):
    drawn_by = {"device": "NVIDIA H200", "torch": "2.9.1", "compile": "none"}
    ledger = Ledger(tmp_path)
    ledger.append(RECIPE, RATIOS, PROMPTS[:1], MEASURED, drawn_by=drawn_by, redrawn=True)
    ledger.append(RECIPE, RATIOS, PROMPTS[1:], MEASURED)
    first, second = Ledger(tmp_path).table().to_pylist()

    assert {name: first[name] for name in DRAWN_BY} == drawn_by
    assert (first["redrawn"], second["redrawn"]) == (True, None)
    assert Ledger(tmp_path).get(RECIPE.key(RATIOS), PROMPTS[0]).drawn_by == drawn_by
    assert Ledger(tmp_path).get(RECIPE.key(RATIOS), PROMPTS[1]).drawn_by == {}
