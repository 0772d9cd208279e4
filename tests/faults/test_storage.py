"""A storage that fails at any moment of a search: nothing that was paid for is lost."""

import random
import re
import shutil
from pathlib import Path

import pytest

from search.ledger import Ledger, LedgerError
from search.storage import Storage, StorageError
from tests.search.landscapes import RECIPE, course, make_search, work
from tests.search.test_ledger import PROMPTS, RATIOS, written


class Full(Storage):
    """Writes so many files, and then none."""

    def write(self, name, data):
        if len(self.files()) >= Full.most:
            raise StorageError(f"{self}: No space left on device: free space there")
        super().write(name, data)


@pytest.mark.parametrize("seed", range(12))
def test_a_disk_that_fills_up_ends_the_search_and_costs_nothing(tmp_path, seed, tally):
    chance = random.Random(seed)
    undisturbed = make_search(tmp_path / "undisturbed", steps=8)
    num_files = work(undisturbed, num_workers=2, seed=seed)
    Full.most = chance.randrange(num_files)
    (tmp_path / "ledger").mkdir()
    search = make_search(Full(*vars(Storage.at(tmp_path / "ledger")).values()), steps=8)
    work(search, num_workers=2, seed=seed)
    rescued = Path(re.search(r"just measured are in (\S+): move them", search.failure)[1])
    # Both workers' last batches are there.
    assert len(list(rescued.iterdir())) in {1, 2}
    for file in rescued.iterdir():
        shutil.move(file, tmp_path / "ledger")
    rescued.rmdir()
    again = make_search(tmp_path / "ledger", steps=8)
    work(again, num_workers=2, seed=seed + 1)
    rows = Ledger(tmp_path / "ledger").table().to_pylist()
    doubled = len(rows) - len({(row["key"], row["prompt"], row["seed"]) for row in rows})

    assert search.failure.count("No space left on device") == 1
    assert course(again) == course(undisturbed)
    assert doubled == 0
    tally("disk full", 1, doubled)


@pytest.mark.parametrize("seed", range(20))
def test_a_ledger_file_that_was_damaged_is_left_out_or_right(tmp_path, seed, tally):
    """A bit turned anywhere, or the file cut anywhere, is never another reward."""
    written(tmp_path)
    (file,) = tmp_path.iterdir()
    data, chance = bytearray(file.read_bytes()), random.Random(seed)
    where = chance.randrange(len(data))
    if seed % 4:
        data[where] ^= 1 << chance.randrange(8)
    else:
        del data[where:]
    file.write_bytes(data)
    try:
        entry = Ledger(tmp_path).get(RECIPE.key(RATIOS), PROMPTS[0])
    except LedgerError:  # The version itself was damaged.
        entry = None
    is_false = entry is not None and entry.reward != 0.25
    tally("ledger file damaged", 1, is_false)

    assert not is_false
