"""The page of a quantization: what is in it, that it is whole and loads nothing, and how a browser shows it."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest
from helpers.command_line import result, spqr
from helpers.tiny_llama import CONFIG, MODEL, tiny_params

from spqr_jax import CheckpointError, SpqrConfig, quantize_checkpoint, save, summarize
from spqr_jax.figures.report import report_page, write_report
from spqr_jax.figures.report_plots import lines
from spqr_jax.storage.checkpoint import describe, load
from spqr_jax.storage.layout import MANIFEST, RECORD
from spqr_jax.storage.manifest import fingerprint
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.storage.record import read_record

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 32)).astype(np.int32)


class Page(HTMLParser):
    """A page that must close what it opens; its cells, its ids, and what its attributes name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.cells: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            self.ids += [value or ""] * (name == "id")
            self.targets += [value or ""] * (name.rpartition(":")[2] in ("src", "href", "data", "action", "poster"))
            self.targets += re.findall(r"url\((.*?)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data

    def rows(self) -> dict[str, list[str]]:
        """For the first cell of each row of the long table, the others."""
        table = self.cells[self.cells.index("matrix") + 6 :]
        return {table[i]: table[i + 1 : i + 6] for i in range(0, len(table), 6)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    params = tiny_params(0)
    source = ModelSource(MODEL, {name: lambda name=name: params[name] for name in params}, None)
    directory = tmp_path_factory.mktemp("report") / "tiny"
    quantize_checkpoint(source, directory, TOKENS, config=SpqrConfig())
    return directory


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "tiny"))


def seal(directory: Path, **files: dict | None) -> None:
    """Replaces JSON files of a checkpoint, deletes those of None, and makes the manifest fit."""
    manifest = json.loads((directory / MANIFEST).read_text())
    for stem, content in files.items():
        path = directory / f"{stem}.json"
        if content is None:
            path.unlink()
            del manifest[path.name]
        else:
            path.write_text(json.dumps(content))
            manifest[path.name] = fingerprint(path)
    (directory / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.slow
def test_every_matrix_has_its_numbers_in_the_page(checkpoint: Path) -> None:
    page, record = Page(report_page(checkpoint)), read_record(checkpoint)
    assert record is not None
    reports = {name: report for block in record.blocks for name, report in block.matrices.items()}
    rows = page.rows()
    assert list(rows) == list(reports)
    assert len(rows) == 14
    for path, entry in describe(checkpoint)["matrices"].items():
        name = path.removesuffix(".kernel")
        report, weights = reports[name], entry["shape"][0] * entry["shape"][1]
        assert report.bits_per_weight == pytest.approx(8 * entry["bytes"] / weights)
        assert report.outlier_share == pytest.approx(entry["outliers"] / weights)
        assert rows[name] == [
            f"{entry['shape'][0]} × {entry['shape'][1]}",
            f"{report.bits_per_weight:.3f}",
            f"{report.outlier_share:.2%}",
            f"{report.relative_error:.2e}",
            f"{report.seconds:.3f}",
        ]


@pytest.mark.slow
def test_totals_settings_and_versions_are_in_the_page(checkpoint: Path) -> None:
    page, record = Page(report_page(checkpoint)), read_record(checkpoint)
    assert record is not None
    cells = page.cells[: page.cells.index("matrix")]
    pairs = dict(zip(cells[::2], cells[1::2], strict=True))
    entries = describe(checkpoint)["matrices"].values()
    weights, packed = sum(np.prod(entry["shape"]) for entry in entries), sum(entry["bytes"] for entry in entries)
    worst = max((m.relative_error, name) for block in record.blocks for name, m in block.matrices.items())
    disk = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    whole = summarize(load(checkpoint).params)
    expected = {
        "bits per quantized weight": f"{8 * packed / weights:.3f}",
        "bits per parameter, those that are not quantized too": f"{whole.bits_per_parameter:.3f}",
        "quantized weights": f"{weights:,} in 14 matrices",
        "their bytes in 16 bits": f"{2 * weights:,}",
        "their bytes packed": f"{packed:,}, {2 * weights / packed:.2f} times smaller",
        "bytes on disk, with the tokenizer": f"{disk:,}, {8 * disk / whole.parameters:.3f} bits per parameter",
        "seconds to quantize": f"{sum(block.seconds for block in record.blocks):,.1f} for 2 blocks",
        "largest relative error": f"{worst[0]:.2e}, of {worst[1]}",
        "outlier threshold": "0.2",
        "refit": "yes",
        "calibration": "2 sequences of 32 tokens",
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        "device": jax.devices()[0].device_kind,
        "date": record.date,
        "hidden size": "32",
        "rotary.scaling": "default",
    }
    assert {label: pairs.get(label) for label in expected} == expected


@pytest.mark.slow
def test_the_page_loads_nothing(checkpoint: Path) -> None:
    text = report_page(checkpoint)
    page = Page(text)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "image", "base"}
    assert "://" not in text
    assert "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    assert page.targets
    assert {target.strip("'\"") for target in page.targets} <= {f"#{name}" for name in page.ids}
    assert text.count("<svg") == 4
    for kind in ("q_proj", "down_proj", "relative error", "outliers (%)"):
        assert kind in page.words


@pytest.mark.slow
def test_names_cannot_be_markup(copy: Path) -> None:
    hostile = '</text></svg><script>alert("x")</script>&amp;$\\frac$'
    header, record = describe(copy), json.loads((copy / RECORD).read_text())
    header["matrices"] = {path.replace("q_proj", hostile): entry for path, entry in header["matrices"].items()}
    header["family"] = hostile
    for block in record["blocks"]:
        block["matrices"] = {name.replace("q_proj", hostile): m for name, m in block["matrices"].items()}
    record["device"] = record["versions"]["jax"] = hostile
    seal(copy, spqr=header, quantization=record)
    renamed = copy.rename(copy.with_name("<i>&'tiny\""))
    text = report_page(renamed)
    page = Page(text)
    assert not page.tags & {"script", "i"}
    assert renamed.name in page.words
    assert next(iter(page.rows())) == f"layers_0.{hostile}"
    assert page.words.count(hostile) >= 6  # in three legends or axes, and in the tables


@pytest.mark.slow
def test_a_checkpoint_without_a_record_says_so(copy: Path, tmp_path: Path) -> None:
    seal(copy, quantization=None)
    assert read_record(copy) is None
    load(copy)
    page = Page(report_page(copy))
    assert "were not recorded" in "".join(page.words)
    assert report_page(copy).count("<svg") == 2
    rows = page.rows()
    assert len(rows) == 14
    assert all(row[3:] == ["–", "–"] and float(row[1]) > 3 for row in rows.values())
    assert "Settings" not in page.words
    save(tmp_path / "again", *load(copy)[:2])
    assert Page(report_page(tmp_path / "again")).rows() == rows


@pytest.mark.slow
def test_a_matrix_outside_blocks_and_without_outliers(copy: Path) -> None:
    header = describe(copy)
    first = next(iter(header["matrices"].values())) | {"outliers": None}
    seal(copy, spqr=header | {"matrices": {"lm_head.kernel": first}}, quantization=None)
    text = report_page(copy)
    assert Page(text).rows()["lm_head"][2] == "0.00%"
    assert "<svg" not in text


@pytest.mark.filterwarnings("error")
@pytest.mark.slow
def test_what_is_no_number_leaves_the_page_whole(copy: Path) -> None:
    record = json.loads((copy / RECORD).read_text())
    for value in (float("nan"), 0.0, float("inf")):
        for block in record["blocks"]:
            for matrix in block["matrices"].values():
                matrix["relative_error"] = value
        seal(copy, quantization=record)
        assert Page(report_page(copy)).rows()["layers_0.q_proj"][3] == f"{value:.2e}"


@pytest.mark.slow
def test_the_command_writes_beside_the_checkpoint_and_leaves_it_as_it_is(copy: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    told = result("report", copy)
    page = tmp_path / "tiny.html"
    assert told == {"page": str(page), "bytes": page.stat().st_size}
    assert page.read_text(encoding="utf-8") == report_page(copy)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert result("report", copy, "--output", tmp_path / "other")["page"] == str(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "tiny", "tiny.html"]
    save(copy, *load(copy)[:2], overwrite=True)
    assert not (copy / RECORD).exists()


@pytest.mark.slow
def test_a_write_that_fails_leaves_the_old_page(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.html").write_text("old")

    def fail(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    done = spqr("report", copy)
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")
    assert (tmp_path / "tiny.html").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny.html"]


@pytest.mark.slow
def test_errors_are_one_sentence(copy: Path, tmp_path: Path) -> None:
    save(tmp_path / "dense", MODEL, tiny_params(0))
    (tmp_path / "folder").mkdir()
    for arguments, message in (
        ((tmp_path / "absent",), "absent does not exist"),
        ((tmp_path / "folder",), "folder is not a checkpoint of this library: it has no spqr.json"),
        ((tmp_path / "dense",), "dense has no packed matrix to report on: quantize the model first"),
        ((copy, "--output", tmp_path / "folder"), "folder is a directory: give the name of a file"),
        ((copy, "--output", tmp_path / "no" / "page"), "page cannot be written, because .*/no is not a directory"),
        ((copy, "--output", copy / "page"), "tiny/page is in the checkpoint, which is not changed: choose a place"),
    ):
        done = spqr("report", *arguments)
        assert done.returncode == 1
        assert re.fullmatch(f"error: .*{message}.*\n", done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "folder", "tiny"]


@pytest.mark.slow
def test_a_damaged_record_is_named(copy: Path) -> None:
    record = json.loads((copy / RECORD).read_text())
    for changed in (record | {"wisdom": 3}, record | {"config": record["config"] | {"wisdom": 3}}, {"config": {}}):
        seal(copy, quantization=changed)
        with pytest.raises(CheckpointError, match=r"quantization\.json does not fit this release .*: use the release"):
            report_page(copy)
    (copy / RECORD).write_text("{}")
    with pytest.raises(CheckpointError, match=r"quantization\.json is 2 bytes .* but manifest\.json says"):
        report_page(copy)
    (copy / RECORD).unlink()
    with pytest.raises(CheckpointError, match=r"quantization\.json is missing"):
        report_page(copy)


@pytest.mark.slow
def test_without_matplotlib_one_sentence_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="drawn by matplotlib, which is not installed: pip install matplotlib"):
        write_report(checkpoint)
    assert not checkpoint.with_name("tiny.html").exists()


def test_logarithmic_ticks_enclose_the_values() -> None:
    drawn = lines("errors", {"one": {0: 0.01, 1: 0.3}, "_two": {0: 0.02, 2: 0.04}}, "error", "log")
    ticks = [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", drawn) if re.fullmatch(r"0\.\d+", text)]
    assert ticks == ["0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5"]
    assert ">_two<" in drawn


@pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is installed")
@pytest.mark.slow
def test_a_browser_shows_the_page(checkpoint: Path, tmp_path: Path) -> None:
    page, picture = write_report(checkpoint, tmp_path / "page.html"), tmp_path / "page.png"
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=900,1200")
    places = (f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}")
    subprocess.run([str(BROWSER), *flags, *places, page.as_uri()], check=True, capture_output=True, timeout=300)
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape[:2] == (1200, 900)
    # Plots have colors; the plain text around them has none.
    colored = np.ptp(pixels, axis=2) > 0.2
    assert colored.mean() > 0.002
    assert 0.5 < (pixels > 0.95).all(axis=2).mean() < 0.99
