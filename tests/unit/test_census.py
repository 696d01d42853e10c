"""The census: what is found, what is counted, and that adding up has no order."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from examples.census.census import (
    FINGERPRINT_MODULUS,
    Census,
    FileReport,
    Function,
    analyse_file,
    analyse_source,
    census_directly,
    find_files,
    standard_library,
)
from examples.census.show import (
    Proof,
    describe,
    progress_bar,
    proof_panel,
    result_table,
    summary,
    timeline_panel,
)

SOURCE = b'''"""Docs."""
import os, sys
from a import b

# a comment

class Outer:
    import inner

    @decorated
    def method(self):
        def nested():
            pass
        return nested

    class Inner:
        async def wait(self):
            try:
                import late
            except ImportError:
                match x:
                    case 1:
                        def deep(): ...
            return lambda: 0
'''


def write(root: Path, files: dict[str, bytes]) -> None:
    """Create files, with their directories, below `root`."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def plain(width: int, **options: object) -> Console:
    """A console that is no terminal."""
    return Console(file=io.StringIO(), width=width, **options)  # type: ignore[arg-type]


def text_of(console: Console) -> str:
    """What was printed."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_definitions_and_imports_are_counted_wherever_they_stand() -> None:
    """Methods, coroutines, nested ones, and those in except and match blocks count."""
    report = analyse_source("pkg/mod.py", SOURCE)
    assert (report.functions, report.classes, report.imports) == (4, 2, 4)
    assert (report.lines, report.code_lines) == (24, 19)
    assert report.error is None
    assert report.package == "pkg"
    assert report.longest_function == Function(
        path="pkg/mod.py", line=17, name="Outer.Inner.wait", lines=8
    )


def test_a_file_at_the_root_is_a_package_of_its_own() -> None:
    """Its package is its name without the suffix."""
    assert analyse_source("ast.py", b"").package == "ast"
    assert analyse_source("email/mime/text.py", b"").package == "email"


def test_of_equally_long_functions_the_first_wins() -> None:
    """The tie does not depend on the order of discovery."""
    report = analyse_source("m.py", b"def b(): ...\ndef a(): ...\n")
    assert report.longest_function is not None
    assert report.longest_function.name == "b"
    reports = [analyse_source(name, b"def f(): ...\n") for name in ("p/z.py", "p/a.py", "p/m.py")]
    for order in (reports, reports[::-1]):
        census = Census()
        for each in order:
            census.add(each)
        longest = census.totals().longest_function
        assert longest is not None
        assert longest.path == "p/a.py"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (b"def f(:\n    pass\n", "line 1"),
        (b"print 'two'\n", "line 1"),
        (b"x = 1\0\ny = 2\n", "null bytes"),
        (b"# -*- coding: no-such-codec -*-\nx = 1\n", "no-such-codec"),
        (b"x = '\xff'\n", "utf-8"),
        (b"(" * 10_000 + b")" * 10_000 + b"\n", ""),
        (b"x = " + b"-" * 100_000 + b"1\n", ""),
        ("x = 1\n".encode("utf-16"), ""),
    ],
    ids=["syntax", "python-2", "null", "codec", "bytes", "parentheses", "deep", "utf-16"],
)
def test_a_file_that_does_not_parse_is_counted_with_its_lines(source: bytes, expected: str) -> None:
    """Nothing is dropped, and the report says why there are only lines."""
    report = analyse_source("bad.py", source)
    assert report.error
    assert expected in report.error
    assert report.lines >= 1
    assert (report.functions, report.classes, report.imports) == (0, 0, 0)
    assert FileReport.model_validate_json(report.model_dump_json()) == report


def test_declared_encodings_and_marks_are_understood() -> None:
    """Latin-1 by cookie and UTF-8 with a byte order mark both parse."""
    latin = "# -*- coding: latin-1 -*-\ndef grüße(): ...\n".encode("latin-1")
    report = analyse_source("m.py", latin)
    assert report.error is None
    assert report.longest_function is not None
    assert report.longest_function.name == "grüße"
    assert analyse_source("m.py", b"\xef\xbb\xbfimport os\n").imports == 1


def test_warnings_of_old_sources_change_nothing() -> None:
    """An invalid escape is a warning, and warnings are errors in this test run."""
    assert analyse_source("m.py", b"x = '\\d'\nassert (1, 'always')\n").error is None


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_a_report_that_survives_json(source: bytes) -> None:
    """Analysis never raises, whatever a file holds."""
    report = analyse_source("any.py", source)
    assert FileReport.model_validate_json(report.model_dump_json()) == report


def test_files_are_found_sorted_relative_and_without_what_is_not_source(tmp_path: Path) -> None:
    """Caches, installed and hidden directories and other suffixes are left out."""
    write(
        tmp_path,
        {
            "b.py": b"",
            "a/z.py": b"",
            "a/b/c.py": b"",
            "a/__pycache__/c.py": b"",
            "site-packages/x.py": b"",
            ".venv/x.py": b"",
            "a/notes.txt": b"",
            "a/native.pyc": b"",
        },
    )
    assert find_files(tmp_path) == ["a/b/c.py", "a/z.py", "b.py"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A loop of links ends, and what a link points to is counted once."""
    write(tmp_path, {"tree/a/m.py": b""})
    (tmp_path / "tree/a/loop").symlink_to(tmp_path / "tree")
    (tmp_path / "tree/a/link.py").symlink_to(tmp_path / "tree/a/m.py")
    (tmp_path / "tree/a/broken.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "tree/dir.py").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "tree")
    assert find_files(tmp_path / "root") == ["a/m.py"]


def test_a_tree_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """A part of a tree would be a wrong census, so it is an error."""
    write(tmp_path, {f"m{index}.py": b"" for index in range(4)})
    assert len(find_files(tmp_path, files_max=4)) == 4
    with pytest.raises(ValueError, match="more than 3"):
        find_files(tmp_path, files_max=3)


def test_a_root_that_is_no_directory_is_an_error(tmp_path: Path) -> None:
    """The message says what to do."""
    with pytest.raises(NotADirectoryError, match="give one"):
        find_files(tmp_path / "nowhere")


def test_names_that_are_not_unicode_are_left_out(tmp_path: Path) -> None:
    """They could not be written into a report."""
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.py")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system refuses such names")
    write(tmp_path, {"good.py": b""})
    assert find_files(tmp_path) == ["good.py"]


def test_a_file_that_vanished_is_reported_so(tmp_path: Path) -> None:
    """It was found, so it is counted."""
    report = analyse_file(tmp_path, "gone/m.py")
    assert report.error is not None
    assert report.error.startswith("cannot be read")
    assert report.lines == 0


def reports_of_asyncio() -> list[FileReport]:
    """Some real reports."""
    root = Path(standard_library(), "asyncio")
    return [analyse_file(root, path) for path in find_files(root)]


@given(st.randoms(use_true_random=False))
@settings(max_examples=10, deadline=None)
def test_the_order_and_grouping_of_reports_do_not_matter(generator: random.Random) -> None:
    """Adding is commutative, merging is associative, and JSON in between changes nothing."""
    expected = census_directly(Path(standard_library(), "json"))
    root = Path(standard_library(), "json")
    reports = [analyse_file(root, path) for path in find_files(root)]
    generator.shuffle(reports)
    parts = [Census() for _ in range(3)]
    for report in reports:
        generator.choice(parts).add(report)
    first, second, third = (Census.model_validate_json(part.model_dump_json()) for part in parts)
    left = first.model_copy(deep=True)
    left.merge(second)
    left.merge(third)
    second.merge(third)
    second.merge(first)
    assert left == second == expected
    assert left.digest() == second.digest() == expected.digest()


def test_a_lost_and_a_doubled_report_change_the_digest() -> None:
    """Even one of each with the same numbers, which no sum would show."""
    one, other = (analyse_source(f"p/{name}.py", b"x = 1\n") for name in "ab")
    right, wrong = Census(), Census()
    for report in (one, other):
        right.add(report)
    for report in (one, one):
        wrong.add(report)
    assert right.totals() == wrong.totals()
    assert right.digest() != wrong.digest()
    assert 0 <= right.fingerprint < FINGERPRINT_MODULUS


def test_the_totals_are_the_sum_of_the_packages() -> None:
    """Of real sources."""
    census = Census()
    reports = reports_of_asyncio()
    for report in reports:
        census.add(report)
    totals = census.totals()
    assert totals.files == len(reports) > 20
    assert totals.lines == sum(report.lines for report in reports)
    assert totals.functions == sum(report.functions for report in reports)
    assert [each.lines for each in census.largest()] == sorted(
        (report.lines for report in reports), reverse=True
    )


def test_an_empty_tree_has_a_census_too(tmp_path: Path) -> None:
    """No files, no packages, and still something to show."""
    census = census_directly(tmp_path)
    assert census == Census()
    console = plain(80)
    console.print(result_table(census, console))
    assert "0 in total" in text_of(console)


@pytest.mark.parametrize("width", [30, 44, 60, 80, 100, 140])
def test_the_last_screen_fits_any_terminal_and_cuts_no_digit(width: int) -> None:
    """Columns are left out instead; the lines of all packages are always there."""
    census = Census()
    for report in reports_of_asyncio():
        census.add(report)
    digest = census.digest()
    console = plain(width)
    events = [(1.2, "node-1 killed with SIGKILL"), (1.434, "all agents answer again")]
    proof = Proof(digest, digest, 33, 0, 0)
    console.print(summary(census, proof, events, 0.234, console, title=describe("/src")))
    printed = text_of(console)
    assert all(len(line) <= width for line in printed.splitlines())
    assert f"{census.totals().lines:,}" in printed
    assert "\x1b" not in printed
    assert ("longest function" in printed) == (width >= 80)
    assert "234 ms" in printed


def test_a_proof_that_fails_says_so_in_words() -> None:
    """Not by colour alone."""
    console = plain(80)
    console.print(proof_panel(Proof("a" * 64, "b" * 64, 10, 1, 2), console))
    printed = text_of(console)
    assert "NO proof" in printed
    assert "different" in printed
    assert "1 lost" in printed
    assert "2 counted twice" in printed


def test_an_output_without_unicode_gets_ascii() -> None:
    """Nothing is printed that the output cannot encode."""
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=file, width=110)
    census = Census()
    for report in reports_of_asyncio():
        census.add(report)
    console.print(result_table(census, console))
    console.print(timeline_panel([(0.0, "start"), (2.5, "end")], console))
    console.print(proof_panel(Proof("a", "a", 1, 0, 0), console))
    file.flush()
    raw = file.buffer
    assert isinstance(raw, io.BytesIO)
    assert b"+2.50 s" in raw.getvalue()


def test_no_color_means_no_colour_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR is honoured even where colours would work."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    console = plain(80, force_terminal=True)
    console.print(proof_panel(Proof("a", "a", 1, 0, 0), console))
    assert "\x1b[32m" not in text_of(console)
    assert "\x1b[1;32m" not in text_of(console)


def test_progress_is_silent_where_there_is_no_terminal() -> None:
    """A log file gets no bars."""
    console = plain(80)
    with progress_bar(console) as progress:
        task = progress.add_task("counting", total=2)
        progress.advance(task, 2)
    assert text_of(console) == ""
