"""Data sets: every kind of file read back to the values that were written, and every kind of trouble refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from maodun.core.errors import InputError
from maodun.zoo.data import list_data, load_data

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
LABELS = [0, 1, 2, 0, 1, 2]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path: Path, contents: list[bytes], labels: list[Any], column: str = "label", names: bool = True) -> Path:
    table = pa.table({"img": [{"bytes": content, "path": None} for content in contents], column: labels})
    info = {"info": {"features": {column: {"_type": "ClassLabel", "names": ["ant", "bee", "cat"]}}}}
    if names:
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path)
    return path


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAODUN_DATA", raising=False)


class TestDigits:
    def test_split_is_fixed_stratified_and_disjoint(self) -> None:
        test, train = load_data("digits"), load_data("digits", split="train")
        assert test.x.shape == (1000, 1, 8, 8)
        assert train.x.shape == (797, 1, 8, 8)
        assert sorted(torch.cat([test.ids, train.ids]).tolist()) == list(range(1797))
        share = test.y.bincount() / (test.y.bincount() + train.y.bincount())
        assert float((share - 1000 / 1797).abs().max()) < 0.01
        # Numbers measured on this split stand in the model cards: it must never move.
        assert hashlib.sha256(test.ids.numpy().tobytes()).hexdigest().startswith(TEST_IDS)
        assert hashlib.sha256(train.ids.numpy().tobytes()).hexdigest().startswith(TRAIN_IDS)

    def test_values_are_sixteenths_and_the_hash_follows_the_content(self) -> None:
        data = load_data("digits", limit=50)
        assert torch.equal((data.x * 16).round() / 16, data.x)
        assert float(data.x.min()) == 0.0
        assert float(data.x.max()) == 1.0
        assert torch.equal(load_data("digits").take(50).x, data.x)
        assert load_data("digits").take(50).sha256 == data.sha256
        assert data.take(49).sha256 != data.sha256

    def test_refusals(self) -> None:
        with pytest.raises(InputError, match="use train or test"):
            load_data("digits", split="validation")
        with pytest.raises(InputError, match="limit 0"):
            load_data("digits", limit=0)


TEST_IDS, TRAIN_IDS = "94a968fbeb249bab", "a693be4afe161530"


class TestFolder:
    def write(self, root: Path) -> Path:
        for k, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
            place = root / "abc"[label]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{k}.png").write_bytes(png(pixels))
        return root

    def test_round_trip(self, tmp_path: Path) -> None:
        data = load_data(f"folder:{self.write(tmp_path)}")
        assert data.classes == ("a", "b", "c")
        assert data.x.shape == (6, 3, 5, 4)
        order = [0, 3, 1, 4, 2, 5]  # sorted by class, then by name
        for x, y, place in zip(data.x, data.y, data.ids, strict=True):
            source = order[int(place)]
            assert torch.equal(x, torch.from_numpy(PIXELS[source]).permute(2, 0, 1) / 255)
            assert int(y) == LABELS[source]

    def test_limit_takes_the_same_first_samples(self, tmp_path: Path) -> None:
        root = self.write(tmp_path)
        assert torch.equal(load_data(f"folder:{root}", limit=4).ids, load_data(f"folder:{root}").ids[:4])

    def test_split_folder_grey_pictures_and_mixed_ones(self, tmp_path: Path) -> None:
        for k in range(2):
            (tmp_path / "test" / "one").mkdir(parents=True, exist_ok=True)
            (tmp_path / "test" / "one" / f"{k}.png").write_bytes(png(PIXELS[k, :, :, 0]))
        assert load_data(f"folder:{tmp_path}").x.shape == (2, 1, 5, 4)
        (tmp_path / "test" / "one" / "2.png").write_bytes(png(PIXELS[2]))
        assert load_data(f"folder:{tmp_path}").x.shape == (3, 3, 5, 4)

    def test_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist"):
            load_data(f"folder:{tmp_path}/absent")
        with pytest.raises(InputError, match=r"no pictures.*<class>/<name>\.png"):
            load_data(f"folder:{tmp_path}")
        self.write(tmp_path)
        (tmp_path / "a" / "big.png").write_bytes(png(np.zeros((9, 9, 3), np.uint8)))
        with pytest.raises(InputError, match="resize all pictures"):
            load_data(f"folder:{tmp_path}")
        (tmp_path / "a" / "big.png").write_bytes(png(PIXELS[0])[:60])
        with pytest.raises(InputError, match=r"big\.png.*not a readable picture"):
            load_data(f"folder:{tmp_path}")
        with pytest.raises(InputError, match="nothing follows the colon"):
            load_data("folder:")


class TestParquet:
    def test_round_trip_over_two_files(self, tmp_path: Path) -> None:
        contents = [png(pixels) for pixels in PIXELS]
        first = parquet(tmp_path / "test-0.parquet", contents[:4], LABELS[:4])
        second = parquet(tmp_path / "test-1.parquet", contents[4:], LABELS[4:])
        data = load_data(f"parquet:{first},{second}")
        assert torch.equal(data.x, torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255)
        assert data.y.tolist() == LABELS
        assert data.classes == ("ant", "bee", "cat")
        assert load_data(f"parquet:{tmp_path}/test-*.parquet").sha256 == data.sha256
        assert load_data(f"hf:{tmp_path}").sha256 == data.sha256
        assert load_data(f"hf:{tmp_path}", limit=5).ids.tolist() == [0, 1, 2, 3, 4]

    def test_columns_can_be_named(self, tmp_path: Path) -> None:
        file = parquet(tmp_path / "x.parquet", [png(PIXELS[0])], [1], column="kind", names=False)
        with pytest.raises(InputError, match=r"no label column.*#label=COLUMN"):
            load_data(f"parquet:{file}")
        assert load_data(f"parquet:{file}#label=kind").y.tolist() == [1]
        with pytest.raises(InputError, match="no option"):
            load_data(f"parquet:{file}#colour=kind")

    def test_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot be read"):
            load_data(f"parquet:{tmp_path}/absent.parquet")
        (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
        with pytest.raises(InputError, match="cannot be read"):
            load_data(f"parquet:{tmp_path}/bad.parquet")
        broken = parquet(tmp_path / "broken.parquet", [png(PIXELS[0]), b"\x89PNG nothing"], [0, 1])
        with pytest.raises(InputError, match=r"row 1 of .*broken\.parquet.*readable picture"):
            load_data(f"parquet:{broken}")
        wrong = parquet(tmp_path / "wrong.parquet", [png(PIXELS[0])] * 2, [0, 3])
        with pytest.raises(InputError, match=r"label 3 of row 1.*0 \.\. 2"):
            load_data(f"parquet:{wrong}")
        with pytest.raises(InputError, match=r"no test\*\.parquet"):
            load_data(f"hf:{tmp_path}")


class TestArrays:
    def save(self, path: Path, **arrays: Any) -> str:
        np.savez(path, **arrays)
        return f"npz:{path}"

    def test_round_trip_of_bytes_floats_and_any_rank(self, tmp_path: Path) -> None:
        bytes_ = load_data(self.save(tmp_path / "a.npz", x=PIXELS, y=LABELS))
        assert torch.equal(bytes_.x, torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255)
        floats = np.random.default_rng(1).random((4, 7)).astype(np.float32)
        data = load_data(
            self.save(tmp_path / "b.npz", x_test=floats, y_test=[0, 1, 1, 0], x=floats + 9, ids=[7, 5, 3, 1])
        )
        assert torch.equal(data.x, torch.from_numpy(floats))
        assert data.ids.tolist() == [7, 5, 3, 1]
        named = load_data(self.save(tmp_path / "c.npz", images=floats, labels=[0, 1, 1, 0], classes=["no", "yes"]))
        assert named.classes == ("no", "yes")

    def test_rounding_dust_is_clipped(self, tmp_path: Path) -> None:
        data = load_data(self.save(tmp_path / "a.npz", x=np.array([[-3e-8, 1 + 1e-7]]), y=[0]))
        assert data.x.tolist() == [[0.0, 1.0]]

    @pytest.mark.parametrize(
        ("x", "y", "message"),
        [
            ([[0.1, np.nan]], [0], "sample 0 has NaN"),
            ([[-1.9, 2.1]], [0], r"look standardised; undo it"),
            ([[0.0, 255.0]], [0], r"look like 0-255; divide by 255"),
            ([[0.0, 70000.0]], [0], "not 0 to 1"),
            ([[0.5, 0.1]], [-1], "label -1 of row 0"),
            ([[0.5, 0.1]], [0.5], r"label 0\.5 of row 0"),
            ([[0.5, 0.1]], [np.nan], "label nan of row 0"),
            ([[0.5, 0.1]], [0, 1], "1 samples but 2 labels"),
            ([[0.5, 0.1]], [[1, 0]], "one whole number per sample"),
            (np.zeros((0, 3)), [], "no samples"),
            (np.zeros((1, 3), np.int64), [0], "unambiguous scale"),
        ],
    )
    def test_values_that_cannot_be_used(self, tmp_path: Path, x: Any, y: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_data(self.save(tmp_path / "a.npz", x=np.asarray(x), y=np.asarray(y)))

    def test_label_beyond_the_classes(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="label 2 of row 1"):
            load_data(self.save(tmp_path / "a.npz", x=np.zeros((2, 3)), y=[0, 2], classes=["a", "b"]))

    def test_nothing_is_unpickled(self, tmp_path: Path) -> None:
        marker = tmp_path / "executed"

        class Bomb:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(marker),)

        with pytest.raises(InputError, match="cannot be read"):
            load_data(self.save(tmp_path / "a.npz", x=np.array([Bomb()], dtype=object), y=[0]))
        assert not marker.exists()

    def test_other_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.npz").write_bytes(b"nothing")
        np.save(tmp_path / "b.npy", PIXELS)
        for name, message in (("a.npz", "cannot be read"), ("b.npy", "single array"), ("c.npz", "cannot be read")):
            with pytest.raises(InputError, match=message):
                load_data(f"npz:{tmp_path / name}")
        with pytest.raises(InputError, match="no array 'y' among x"):
            load_data(self.save(tmp_path / "d.npz", x=PIXELS))


class TestMnist:
    def write(self, root: Path, packed: bool) -> Path:
        images = struct.pack(">4B3I", 0, 0, 8, 3, 3, 28, 28) + bytes(range(256)) * 9 + bytes(48)
        labels = struct.pack(">4BI", 0, 0, 8, 1, 3) + bytes([3, 1, 4])
        for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
            name = root / f"t10k-{kind}-ubyte"
            if packed:
                name.with_name(name.name + ".gz").write_bytes(gzip.compress(content))
            else:
                name.write_bytes(content)
        return root

    @pytest.mark.parametrize("packed", [True, False])
    def test_round_trip(self, tmp_path: Path, packed: bool) -> None:
        data = load_data(f"mnist:{self.write(tmp_path, packed)}")
        assert data.x.shape == (3, 1, 28, 28)
        assert torch.equal(data.x.flatten()[:256], torch.arange(256) / 255)
        assert data.y.tolist() == [3, 1, 4]
        assert load_data(f"mnist:{tmp_path}", limit=2).y.tolist() == [3, 1]

    def test_refusals(self, tmp_path: Path, no_data: None) -> None:
        with pytest.raises(InputError, match="MAODUN_DATA names, and that is unset"):
            load_data("mnist")
        with pytest.raises(InputError, match="does not exist"):
            load_data(f"mnist:{tmp_path}")
        self.write(tmp_path, packed=False)
        whole = (tmp_path / "t10k-images-idx3-ubyte").read_bytes()
        (tmp_path / "t10k-images-idx3-ubyte").write_bytes(whole[:-1])
        with pytest.raises(InputError, match="ends before its last value"):
            load_data(f"mnist:{tmp_path}")
        (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"<html>")
        with pytest.raises(InputError, match="does not begin as an idx file"):
            load_data(f"mnist:{tmp_path}")


class TestHub:
    def test_missing_library_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(InputError, match=r"datasets library; pip install 'maodun\[hf\]'"):
            load_data("hf:someone/something")

    def test_a_hub_id_goes_through_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Image_:
            pass

        class ClassLabel:
            names = ("ant", "bee", "cat")

        Image_.__name__ = "Image"
        asked: list[Any] = []

        class Rows:
            features = {"picture": Image_(), "kind": ClassLabel()}  # noqa: RUF012

            def __getitem__(self, column: str) -> list[Any]:
                return [Image.fromarray(p) for p in PIXELS] if column == "picture" else LABELS

        fake = types.ModuleType("datasets")
        fake.load_dataset = lambda *args, **kwargs: asked.append((args, kwargs)) or Rows()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", fake)
        data = load_data("hf:someone/insects#config=small", split="validation", limit=6)
        assert asked == [(("someone/insects", "small"), {"split": "validation[:6]"})]
        assert torch.equal(data.x, torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255)
        assert data.classes == ("ant", "bee", "cat")
        assert data.name == "insects"

    def test_the_librarys_complaint_is_passed_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = types.ModuleType("datasets")

        def load_dataset(*_: Any, **__: Any) -> None:
            raise ConnectionError("no route to host")

        fake.load_dataset = load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", fake)
        with pytest.raises(InputError, match="no route to host"):
            load_data("hf:someone/something")


def test_unknown_kind_gets_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'digits'"):
        load_data("digit")


def test_listing_says_what_is_there(no_data: None) -> None:
    rows = {row.spec: row for row in list_data()}
    assert rows["digits"].available
    assert not rows["cifar10"].available


needs_data = pytest.mark.skipif(not os.environ.get("MAODUN_DATA"), reason="MAODUN_DATA is not set")


@needs_data
@pytest.mark.data
class TestRealData:
    def test_cifar10_keeps_the_original_order(self) -> None:
        data = load_data("cifar10", limit=10)
        assert data.y.tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
        assert data.x.shape == (10, 3, 32, 32)
        assert data.classes[3] == "cat"
        assert (data.x[0, :, 0, 0] * 255).round().tolist() == [158.0, 112.0, 49.0]

    def test_mnist_keeps_the_original_order(self) -> None:
        data = load_data("mnist", limit=10)
        assert data.y.tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
        assert load_data("mnist", split="train", limit=5).y.tolist() == [5, 0, 4, 1, 9]
