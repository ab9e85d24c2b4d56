"""The price of a job before it runs, and the line that shows how far it is."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from tiny_models import Listed, llava, samples

from mechanistic.capture.job import capture_run, price_run
from mechanistic.capture.price import Price, SitePrice, check_price, free_bytes
from mechanistic.capture.progress import Progress, human_bytes, human_seconds
from mechanistic.store import open_run, read_manifest, site
from mechanistic.store.errors import DiskFullError, UsageError

SITES = ["text.*.resid_post[text]", "text.1.q{0+2}[last]", "vision.*.k:float16", "text.*.attn_out[last]"]


def test_price_run__is_what_the_run_then_holds(tmp_path: Path) -> None:
    loaded, dataset = llava(), Listed(samples(4, images=(1, 2)))
    cost = price_run(loaded, dataset, tmp_path / "run", sites=SITES, max_new_tokens=2)
    capture_run(loaded, dataset, tmp_path / "run", sites=SITES, max_new_tokens=2, quiet=True)
    run = open_run(tmp_path / "run")
    for priced in cost.sites:
        array = site(run, priced.group)[priced.group.split("/")[1]]
        labels = 12 * priced.rows
        # Answers may end early, so the price is an upper bound; by at most the answer's two tokens.
        held = array.nbytes / 4
        assert held <= (priced.raw - labels) * (1 + 1e-9)
        assert held >= (priced.raw - labels) * (priced.rows - 2) / priced.rows or priced.rows < 3
    assert [priced.group for priced in cost.sites] == [
        "text/resid_post",
        "text/resid_post_last",
        "text/q",
        "vision/k",
        "text/attn_out_last",
    ]
    assert 0.3 < read_manifest(tmp_path / "run").stored_bytes / cost.stored < 2


def test_price__table_shows_every_site_and_the_totals() -> None:
    cost = Price(100, (SitePrice("text/q", "text.*.q[text]", 12.5, 2e6, 1e6),), 5000.0, 10**12)
    lines = cost.table().splitlines()
    assert lines[1].split()[:2] == ["text/q", "(text.*.q[text])"]
    assert lines[1].split()[2:] == ["12.5", "2.0", "MB", "200.0", "MB", "100.0", "MB"]
    assert "all 100 samples" in lines[3]
    assert lines[-1] == "free on that disk: 1.0 TB"


def test_check_price__stops_what_does_not_fit_or_is_large() -> None:
    fits = Price(1, (SitePrice("g", "s", 1, 2e9, 1e9),), 0.0, 10**12)
    check_price(fits, yes=False)
    with pytest.raises(DiskFullError, match=r"about 1\.0 GB on disk .*; 500\.0 MB are free"):
        check_price(Price(1, fits.sites, 0.0, 500_000_000), yes=True)
    large = Price(200, fits.sites, 0.0, 10**12)
    with pytest.raises(UsageError, match=r"200\.0 GB.*more than 100\.0 GB"):
        check_price(large, yes=False)
    check_price(large, yes=True)


def test_free_bytes__of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") > 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress__shows_rates_time_left_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    stream = Terminal()
    progress = Progress(100, 20, stream)
    clock[0] = 10.0
    progress.advance(20, 4000, lambda: 3_000_000)
    assert progress.line() == "40/100 samples  2.0 samples/s  400 tokens/s  3.0 MB written  30 s left"
    assert stream.getvalue().startswith("\r40/100")
    progress.close(4_000_000)
    assert stream.getvalue().endswith("\n")
    progress.advance(20, None, lambda: 3_000_000)
    assert progress.line() == "60/100 samples  4.0 samples/s  4.0 MB written  10 s left"


def test_progress__in_a_log_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    progress = Progress(100, 0, stream)
    for _ in range(40):
        clock[0] += 1
        progress.advance(1, 10, lambda: 100)
    progress.close(100)
    assert stream.getvalue().count("\n") == 2
    assert "\r" not in stream.getvalue()


def test_progress__quiet_says_nothing() -> None:
    stream = io.StringIO()
    progress = Progress(2, 0, stream, quiet=True)
    progress.advance(2, 1, lambda: 1)
    progress.say("hello")
    progress.close(1)
    assert stream.getvalue() == ""


def test_human__units() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 2.5e9, 3e15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "2.5 GB",
        "3000.0 TB",
    ]
    assert [human_seconds(n) for n in (5, 600, 3725 * 2)] == ["5 s", "10 min", "2 h 04 min"]
