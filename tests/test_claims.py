"""Claims over several processes and hosts: one holder at a time, dead owners are followed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemf import claims, processes
from nemf.claims import Busy, claimed
from nemf.errors import NemfError
from nemf.processes import draft_beside, known_dead, process_name, sweep_folder

FOREIGN = "0123456789abcdef-4026531836~77.123 otherhost\n"  # of another machine

HOLD = """
import sys, time
from pathlib import Path
from nemf.claims import claimed
with claimed(Path(sys.argv[1]), ".lock", "busy"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "held"
    return process


def left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_one_process_holds_and_gives_back(tmp_path: Path) -> None:
    with claimed(tmp_path, ".lock", "is busy"):
        with pytest.raises(Busy, match=rf"is busy \(process {os.getpid()} on "):
            claimed(tmp_path, ".lock", "is busy").__enter__()
        with claimed(tmp_path, ".other", "another name is another claim"):
            pass
    with claimed(tmp_path, ".lock", "is busy"):
        pass
    assert left(tmp_path) == [".lock.2", ".other.1"]  # the free claim keeps its number


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owner_is_followed_at_once(tmp_path: Path, reaped: bool) -> None:
    process = holder(tmp_path)
    with pytest.raises(Busy, match=rf"process {process.pid} on "):
        claimed(tmp_path, ".lock", "busy").__enter__()
    process.send_signal(signal.SIGKILL)
    if reaped:
        process.wait()
    else:  # a zombie still has its number
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
    with claimed(tmp_path, ".lock", "busy"):
        assert left(tmp_path) == [".lock.2"]
    process.wait()


def test_a_number_used_again_is_another_process() -> None:
    place, _, rest = process_name().rpartition("~")
    pid, _, born = rest.partition(".")
    assert not known_dead(process_name())
    assert known_dead(f"{place}~{pid}.{int(born) - 1}")
    assert not known_dead(FOREIGN.split()[0])  # nobody here can know
    assert not known_dead("")


def test_an_owner_elsewhere_without_a_sign_of_life_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMF_CLAIM_TIMEOUT_S", "0.5")
    (tmp_path / ".lock.4").write_text(FOREIGN)
    with claimed(tmp_path, ".lock", "busy"):
        assert left(tmp_path) == [".lock.5"]


@pytest.mark.parametrize("offset_s", [-(10**6), 10**6])
def test_an_owner_elsewhere_that_lives_is_refused_whatever_its_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset_s: int
) -> None:
    """Its clock is days ahead or behind, or jumps: only that something changes counts."""
    monkeypatch.setenv("NEMF_CLAIM_TIMEOUT_S", "30")
    claim = tmp_path / ".lock.4"
    claim.write_text(FOREIGN)
    over = threading.Event()

    def beat() -> None:
        count = 0
        while not over.wait(0.05):
            count += 1
            os.utime(claim, (offset_s + 10**7 + count % 7, offset_s + 10**7 + count % 7))

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(Busy, match="process 77 on otherhost"):
            claimed(tmp_path, ".lock", "busy").__enter__()
    finally:
        over.set()
        heart.join()
    assert left(tmp_path) == [".lock.4"]


def test_an_owner_touches_its_claim_and_learns_that_it_lost_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMF_CLAIM_TIMEOUT_S", "0.3")
    with claimed(tmp_path, ".lock", "busy") as claim:
        file = tmp_path / ".lock.1"
        os.utime(file, (1, 1))
        end = time.monotonic() + 30
        while file.stat().st_mtime == 1:
            assert time.monotonic() < end
            time.sleep(0.01)
        claim.check()
        (tmp_path / ".lock.2").write_text(FOREIGN)
        with pytest.raises(NemfError, match="another process took over"):
            claim.check()
    assert (tmp_path / ".lock.2").read_text() == FOREIGN  # giving back does not touch it


def test_of_many_that_want_a_dead_owner_s_claim_one_at_a_time_has_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from nemf.claims import claimed\n"
        "root = Path(sys.argv[1])\n"
        "for _ in range(15):\n"
        "    with claimed(root, '.lock', 'busy', timeout_s=60):\n"
        "        (root / 'inside').mkdir()  # fails if somebody else is inside\n"
        "        with open(root / 'count', 'a') as file: file.write('x')\n"
        "        (root / 'inside').rmdir()\n"
    )
    process = holder(tmp_path)
    others = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    process.kill()
    process.wait()
    assert [other.wait() for other in others] == [0] * 4
    assert (tmp_path / "count").read_text() == "x" * 60
    assert left(tmp_path) == [".lock.61", "count"]


def test_a_claim_made_from_a_stale_listing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file server a folder may be seen as it was: then the highest number still counts."""
    (tmp_path / ".lock.3").write_text(FOREIGN)
    assert not claims._make(tmp_path, ".lock", 2)
    assert left(tmp_path) == [".lock.3"]


def test_timeouts_and_folders_that_cannot_be_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("0", "-1", "soon", "inf", "nan"):
        monkeypatch.setenv("NEMF_CLAIM_TIMEOUT_S", text)
        with pytest.raises(NemfError, match="NEMF_CLAIM_TIMEOUT_S="):
            claimed(tmp_path, ".lock", "busy").__enter__()
    monkeypatch.delenv("NEMF_CLAIM_TIMEOUT_S")
    (tmp_path / "file").write_text("")
    with pytest.raises(NemfError, match="cannot be written"):
        claimed(tmp_path / "file" / "below", ".lock", "busy").__enter__()


def test_drafts_of_killed_writers_are_removed_and_others_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"

    def draft_of(name: str) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(processes, "process_name", lambda: name)
            return draft_beside(path)

    place, _, rest = process_name().rpartition("~")
    dead = f"{place}~{rest.partition('.')[0]}.1"
    kept = [draft_of(process_name()), draft_of(FOREIGN.split()[0]), tmp_path / ".a.json-x"]
    gone = [draft_of(dead), draft_of(dead), draft_of(dead)]
    gone[2] = gone[2].with_name(f"{gone[2].name}-journal")  # SQLite's, of a draft
    for file in (*kept, gone[0], gone[2]):
        file.write_text("")
    gone[1].mkdir()
    draft_beside(tmp_path / "b.json")
    assert all(file.exists() for file in (*kept, *gone))
    draft_beside(path)
    assert [file.exists() for file in (*kept, *gone)] == [True] * 3 + [False] * 3


def test_a_folder_is_swept_of_drafts_of_any_name(tmp_path: Path) -> None:
    place, _, rest = process_name().rpartition("~")
    dead = f"{place}~{rest.partition('.')[0]}.1"
    names = {name: f".epoch-1.pth-{name}-0123abcd" for name in (dead, process_name())}
    for name in (*names.values(), ".hidden", "epoch-1.pth"):
        (tmp_path / name).write_text("")
    sweep_folder(tmp_path)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {names[process_name()], ".hidden", "epoch-1.pth"}


def test_a_forked_child_has_a_name_of_its_own(tmp_path: Path) -> None:
    mine: Callable[[], str] = process_name
    before, file = mine(), tmp_path / "name"
    child = os.fork()
    if not child:
        file.write_text(mine())
        os._exit(0)
    os.waitpid(child, 0)
    assert file.read_text() != before == mine()
