import json
import os
import threading

import huggingface_hub
import pytest
from PIL import Image

from diptych.models.errors import ModelError
from diptych.models.training.model_card import draw_curves, write_card

CARD = {
    "kind": "cnn-lstm",
    "summary": "Describes images.",
    "data": {"train": {"rows": 6000}, "source": ["a", "b"]},
    "options": {"dropout": 0.5, "odd | name": "<img>\nx", "none": None},
    "scores": {"CIDEr": 0.512345, "BLEU-4": 0.2},
    "digest": "0123456789abcdef",
    "versions": {"diptych": "0.1.0", "torch": "2.5"},
}
HISTORY = [
    {"epoch": i, "train_loss": 5 / i, "validation_loss": 5 / i + 0.5, "CIDEr": 0.1 * i, "rows_per_s": 1e6}
    for i in range(1, 6)
]


class TestCard:
    def test_json_is_the_card(self, tmp_path):
        write_card(tmp_path, CARD)
        assert json.loads((tmp_path / "model_card.json").read_text()) == CARD

    def test_markdown_is_a_card_that_hugging_face_reads(self, tmp_path):
        write_card(tmp_path, CARD)
        card = huggingface_hub.ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
        assert card.data.library_name == "diptych"
        assert card.data.pipeline_tag == "image-to-text"
        assert {r.metric_name: r.metric_value for r in card.data.eval_results} == CARD["scores"]

    def test_markdown_says_all(self, tmp_path):
        write_card(tmp_path, CARD)
        text = (tmp_path / "README.md").read_text()
        for part in (
            "diptych caption --model cnn-lstm:FOLDER --input SRC --output OUT",
            "Describes images.",
            "| train.rows | 6000 |",
            "| source | a, b |",
            "| odd \\| name | &lt;img> x |",
            "| CIDEr | 0.5123 |",
            "| torch | 2.5 |",
            "`0123456789abcdef`",
            "![Training](loss.png)",
        ):
            assert part in text

    def test_text_model(self, tmp_path):
        write_card(tmp_path, {"kind": "word2vec"})
        text = (tmp_path / "README.md").read_text()
        assert "diptych embed --model word2vec:FOLDER" in text
        card = huggingface_hub.ModelCard(text)
        assert card.data.pipeline_tag == "feature-extraction"
        assert card.data.eval_results is None
        assert "Scores" not in text

    @pytest.mark.parametrize("kind", ["vae", "gan"])
    def test_image_model(self, tmp_path, kind):
        write_card(tmp_path, {"kind": kind, "scores": {"sample_distance": 0.2}})
        text = (tmp_path / "README.md").read_text()
        assert f"diptych generate --model {kind}:FOLDER --prompts SRC" in text
        assert huggingface_hub.ModelCard(text).data.pipeline_tag == "text-to-image"

    def test_a_number_that_json_does_not_know(self, tmp_path):
        write_card(tmp_path, {"kind": "word2vec", "scores": {"a": float("nan"), "b": 1.0}})
        found = json.loads((tmp_path / "model_card.json").read_text(), parse_constant=pytest.fail)
        assert found["scores"] == {"a": None, "b": 1.0}

    def test_again_over_the_old_one(self, tmp_path):
        write_card(tmp_path, CARD)
        write_card(tmp_path, {**CARD, "digest": "other"})
        assert json.loads((tmp_path / "model_card.json").read_text())["digest"] == "other"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "model_card.json"]

    def test_disk_full(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ModelError, match=r"model_card.json cannot be written: No space left"):
            write_card(tmp_path, CARD)
        assert list(tmp_path.iterdir()) == []

    def test_no_folder(self, tmp_path):
        with pytest.raises(ModelError, match="cannot be written: No such file"):
            write_card(tmp_path / "nowhere", CARD)


class TestCurves:
    def test_is_a_legible_png(self, tmp_path):
        draw_curves(HISTORY, tmp_path / "loss.png", "costs $5 and $6")
        with Image.open(tmp_path / "loss.png") as image:
            assert image.format == "PNG"
            assert image.width >= 640
            assert image.height >= 400

    def lines(self, monkeypatch, tmp_path, history):
        from matplotlib.axes import Axes

        drawn = {}
        plot = Axes.plot

        def record(axes, x, y, **style):
            drawn[style["label"]] = (axes.get_ylabel(), list(x), list(y))
            return plot(axes, x, y, **style)

        monkeypatch.setattr(Axes, "plot", record)
        draw_curves(history, tmp_path / "loss.png", "title")
        return drawn

    def test_losses_and_scores_each_on_their_axis(self, monkeypatch, tmp_path):
        drawn = self.lines(monkeypatch, tmp_path, HISTORY)
        assert drawn.keys() == {"train loss", "validation loss", "CIDEr"}
        assert drawn["CIDEr"] == ("score", [1, 2, 3, 4, 5], [e["CIDEr"] for e in HISTORY])
        assert drawn["train loss"][1:] == ([1, 2, 3, 4, 5], [e["train_loss"] for e in HISTORY])

    @pytest.mark.parametrize("history", [[], [{}], [{"epoch": 1, "rows_per_s": 2.0}], HISTORY[:1]])
    def test_little_or_nothing_to_draw(self, tmp_path, history):
        draw_curves(history, tmp_path / "loss.png", "title")
        assert (tmp_path / "loss.png").stat().st_size > 1000

    def test_what_is_not_there_or_not_finite_is_left_out(self, monkeypatch, tmp_path):
        history = [
            {"train_loss": float("nan")},
            {"train_loss": 2.0, "BLEU-4": 0.1},
            {"train_loss": 1.0},
            {"train_loss": None},
        ]
        drawn = self.lines(monkeypatch, tmp_path, history)
        assert drawn["train loss"][1:] == ([2, 3], [2.0, 1.0])
        assert drawn["BLEU-4"][1:] == ([2], [0.1])

    def test_leaves_no_global_state(self, tmp_path):
        import matplotlib

        before = dict(matplotlib.rcParams)
        thread = threading.Thread(target=draw_curves, args=(HISTORY, tmp_path / "loss.png", "title"))
        thread.start()
        thread.join()
        assert (tmp_path / "loss.png").exists()
        assert dict(matplotlib.rcParams) == before

    def test_unwritable(self, tmp_path):
        with pytest.raises(ModelError, match=r"loss.png cannot be written"):
            draw_curves(HISTORY, tmp_path / "nowhere" / "loss.png", "title")
