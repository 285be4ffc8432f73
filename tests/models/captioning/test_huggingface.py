import dataclasses
import io
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from diptych.models.base import CaptionOptions
from diptych.models.captioning.huggingface import HuggingFaceCaptioner
from diptych.models.errors import ModelError
from diptych.models.spec import ModelSpec, load_model

SUBJECTS = ["a", "dog", "cat", "man", "woman", "two", "ball", "hat", "beach", "snow"]
WORDS = [*SUBJECTS, "runs", "sits", "on", "the", "in", "with", "red", "blue", "big", "small"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
PAD, UNK, CLS, SEP = range(4)
# wide enough that the caption depends on the photo, and ends now and then
LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**LAYERS, "image_size": 32, "patch_size": 8, "initializer_range": 0.3}
TEXT = {
    **LAYERS,
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": CLS,
    "eos_token_id": SEP,
}
SQUARE = {"height": 32, "width": 32}
FAMILIES = ["blip", "git", "vit_gpt2"]
OPTIONS = {
    "greedy": CaptionOptions(beam_width=1, max_words=12),
    "beam": CaptionOptions(beam_width=3, num_captions=2, max_words=9),
}


def tokenizer():
    """A tokenizer of whole words, as BERT's puts them between [CLS] and [SEP]."""
    numbers = {word: number for number, word in enumerate(VOCABULARY)}
    words = Tokenizer(tokenizer_models.WordLevel(numbers, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def save_blip(folder):
    config = transformers.BlipConfig(
        text_config={**TEXT, "sep_token_id": SEP, "encoder_hidden_size": 16, "projection_dim": 16},
        vision_config={**VISION, "projection_dim": 16},
        projection_dim=16,
    )
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    transformers.BlipProcessor(transformers.BlipImageProcessor(size=SQUARE), tokenizer()).save_pretrained(
        folder
    )


def save_git(folder):
    config = transformers.GitConfig(vision_config=VISION, **TEXT)
    transformers.GitForCausalLM(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    transformers.GitProcessor(images, tokenizer()).save_pretrained(folder)


def save_vit_gpt2(folder):
    """As nlpconnect/vit-gpt2-image-captioning: image processor and tokenizer, and no processor that joins them."""
    decoder = transformers.GPT2Config(
        vocab_size=len(VOCABULARY),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=CLS,
        eos_token_id=SEP,
        is_decoder=True,
        add_cross_attention=True,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VISION), decoder
    )
    model = transformers.VisionEncoderDecoderModel(config=config)
    model.generation_config.update(decoder_start_token_id=CLS, eos_token_id=SEP, pad_token_id=SEP)
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size=SQUARE).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model of each family."""
    root = tmp_path_factory.mktemp("huggingface")
    for save in (save_blip, save_git, save_vit_gpt2):
        torch.manual_seed(0)
        save(root / save.__name__.removeprefix("save_"))
    return root


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the BLIP, to be damaged."""
    return Path(shutil.copytree(folders / "blip", tmp_path / "model"))


def photo(seed):
    draw = np.random.default_rng(seed)
    size = (int(draw.integers(20, 60)), int(draw.integers(20, 60)))
    image = Image.fromarray(draw.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize(size)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


PHOTOS = [photo(seed) for seed in range(12)]


def load(folder, options=OPTIONS["greedy"]):
    return HuggingFaceCaptioner.load(str(folder), options, "cpu")


def run(captioner, photos=PHOTOS):
    return captioner.predict(captioner.prepare(photos))


def peer(folder, data, **flags):
    """One photo by transformers alone: what it generates, and the model, its inputs and its tokenizer."""
    classes = {"blip": transformers.BlipForConditionalGeneration, "git": transformers.GitForCausalLM}
    model = classes.get(folder.name, transformers.VisionEncoderDecoderModel).from_pretrained(folder).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    images = transformers.AutoImageProcessor.from_pretrained(folder)
    inputs = images(images=Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="pt")
    return model.generate(**inputs, do_sample=False, **flags), model, inputs, words


class TestEqualsTransformers:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("search", OPTIONS)
    def test_captions(self, folders, family, search):
        options = OPTIONS[search]
        flags = {
            "num_beams": options.beam_width,
            "num_return_sequences": options.num_captions,
            "max_new_tokens": options.max_words,
        }
        found = run(load(folders / family, options))
        for data, captions in zip(PHOTOS[:6], found, strict=False):
            sequences, _, _, words = peer(folders / family, data, **flags)
            expected = [text.strip() for text in words.batch_decode(sequences, skip_special_tokens=True)]
            assert list(captions.candidates) == expected
        assert len({captions.candidates for captions in found}) > 3

    @pytest.mark.parametrize("family", FAMILIES)
    def test_scores_of_beam_search(self, folders, family):
        options = CaptionOptions(beam_width=4, num_captions=4, max_words=7, length_penalty=0)
        flags = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 7, "length_penalty": 0.0}
        for data, captions in zip(PHOTOS[:4], run(load(folders / family, options)), strict=False):
            output, *_ = peer(
                folders / family, data, **flags, return_dict_in_generate=True, output_scores=True
            )
            assert captions.scores == pytest.approx(output.sequences_scores.tolist(), abs=1e-4)

    @pytest.mark.parametrize("search", OPTIONS)
    def test_scores_are_what_the_model_gives_the_caption(self, folders, search):
        # or tokens that are no text are lost from the captions
        never = (("suppress_tokens", [PAD, UNK, CLS]),)
        found = run(load(folders / "vit_gpt2", dataclasses.replace(OPTIONS[search], generation=never)))
        _, model, _, words = peer(folders / "vit_gpt2", PHOTOS[0], max_new_tokens=1)
        images = transformers.AutoImageProcessor.from_pretrained(folders / "vit_gpt2")
        num_ended = 0
        for data, captions in zip(PHOTOS, found, strict=True):
            pixels = images(
                images=Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="pt"
            ).pixel_values
            for text, score in zip(captions.candidates, captions.scores, strict=True):
                tokens = words.encode(text, add_special_tokens=False)
                if len(tokens) < OPTIONS[search].max_words:
                    tokens.append(SEP)
                    num_ended += 1
                given = torch.tensor([[CLS, *tokens[:-1]]])
                with torch.inference_mode():
                    log_probs = model(pixel_values=pixels, decoder_input_ids=given).logits.log_softmax(-1)[0]
                expected = log_probs[torch.arange(len(tokens)), torch.tensor(tokens)].sum()
                assert score == pytest.approx(float(expected), abs=1e-4)
        assert 0 < num_ended < len(PHOTOS) * OPTIONS[search].num_captions

    @pytest.mark.parametrize("family", FAMILIES)
    def test_features_are_the_encoders_mean(self, folders, family):
        options = CaptionOptions(beam_width=2, max_words=3, features=True)
        captioner = load(folders / family, options)
        assert captioner.feature_dim == 16
        found = run(captioner)
        for data, captions in zip(PHOTOS[:3], found, strict=False):
            _, model, inputs, _ = peer(folders / family, data, max_new_tokens=1)
            encoder = {
                "blip": lambda model: model.vision_model,
                "git": lambda model: model.git.image_encoder,
                "vit_gpt2": lambda model: model.encoder,
            }[family](model)
            with torch.inference_mode():
                expected = encoder(pixel_values=inputs["pixel_values"]).last_hidden_state.mean(1)[0].numpy()
            assert captions.features.dtype == np.float32
            np.testing.assert_allclose(captions.features, expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("search", OPTIONS)
def test_a_photo_does_not_depend_on_those_beside_it(folders, family, search):
    captioner = load(folders / family, dataclasses.replace(OPTIONS[search], features=True))
    whole = run(captioner)
    alone = [run(captioner, [data])[0] for data in PHOTOS]
    turned = run(captioner, PHOTOS[::-1])[::-1]
    for first, second, third in zip(whole, alone, turned, strict=True):
        assert first.candidates == second.candidates == third.candidates
        assert first.scores == pytest.approx(second.scores, abs=1e-4)
        np.testing.assert_allclose(first.features, second.features, atol=1e-5)


class TestOptions:
    def test_words_candidates_and_no_features(self, folders):
        captioner = load(folders / "git", CaptionOptions(beam_width=4, num_captions=3, max_words=4))
        assert captioner.feature_dim is None
        for captions in run(captioner):
            assert len(captions.candidates) == len(captions.scores) == 3
            assert max(len(text.split()) for text in captions.candidates) <= 4
            assert captions.features is None
            assert max(captions.scores) < 0

    def test_no_repeated_pair(self, folders):
        def repeats(options):
            texts = [captions.candidates[0].split() for captions in run(load(folders / "blip", options))]
            pairs = [list(itertools.pairwise(words)) for words in texts]
            return sum(len(row) - len(set(row)) for row in pairs)

        assert repeats(CaptionOptions(beam_width=1)) > 0
        assert repeats(CaptionOptions(beam_width=1, no_repeat_ngram=2)) == 0

    def test_length_penalty(self, folders):
        def num_words(penalty):
            options = CaptionOptions(beam_width=3, length_penalty=penalty)
            return sum(len(c.candidates[0].split()) for c in run(load(folders / "vit_gpt2", options)))

        assert num_words(-4.0) < num_words(4.0)

    def test_flags_of_generation_are_passed_on(self, folders):
        def words(**generation):
            options = CaptionOptions(beam_width=1, generation=tuple(generation.items()))
            return {word for c in run(load(folders / "blip", options)) for word in c.candidates[0].split()}

        assert "ball" in words()
        assert "ball" not in words(suppress_tokens=[VOCABULARY.index("ball")], do_sample=False)

    def test_the_digest_stands_for_weights_and_options(self, folders, folder):
        options = [
            CaptionOptions(),
            CaptionOptions(beam_width=2),
            CaptionOptions(generation=(("min_length", 2),)),
        ]
        digests = [load(folders / "blip", each).digest for each in options]
        assert len(set(digests)) == 3
        assert load(folder, options[0]).digest == digests[0]
        transformers.BlipForConditionalGeneration(
            transformers.BlipConfig.from_pretrained(folder)
        ).save_pretrained(folder)
        assert load(folder, options[0]).digest != digests[0]

    def test_by_its_name(self, folders):
        spec = ModelSpec("hf", str(folders / "git"), OPTIONS["greedy"], "cpu")
        assert isinstance(load_model(spec), HuggingFaceCaptioner)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_nothing_is_printed(self, folders, family, capfd):
        run(load(folders / family, OPTIONS["beam"]), PHOTOS[:1])
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"generation": (("repetition_penaltY", 2.0),)}, "'repetition_penaltY' is no flag of generation"),
            (
                {"generation": (("output_scores", False),)},
                "'output_scores' is no flag of generation that can",
            ),
            ({"generation": (("num_beams", 4),)}, "'num_beams' of `generation` is `beam_width` here"),
            ({"generation": (("max_length", 4),)}, "'max_length' of `generation` is `max_words` here"),
            ({"generation": (("do_sample", True),)}, "'do_sample' of generation is for captions that differ"),
            ({"generation": (("top_p", 0.5),)}, "'top_p' of generation is for captions that differ"),
            ({"generation": (("repetition_penalty", -1.0),)}, "strictly positive float, but is -1.0"),
            ({"generation": (("num_beam_groups", 3),)}, "cannot caption an image with these options"),
            ({"num_captions": 4}, r"`num_captions` is 4\. It must be between 1 and `beam_width` 3"),
            ({"num_captions": 0}, "`num_captions` is 0"),
            ({"max_words": 0}, "`max_words` is 0"),
            ({"max_words": 512}, r"`max_words` is 512\. It must be below \d+, as many positions as"),
        ],
    )
    def test_what_cannot_be_is_refused_at_once(self, folders, options, message):
        with pytest.raises(ModelError, match=message):
            load(folders / "blip", CaptionOptions(**options))


class TestImages:
    def test_one_that_cannot_be_decoded(self, folders):
        with pytest.raises(OSError, match="cannot identify image"):
            load(folders / "blip").prepare([PHOTOS[0], b"no image"])

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
    def test_of_any_colour_space(self, folders, mode):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(PHOTOS[0])).convert(mode).save(buffer, "TIFF")
        assert len(run(load(folders / "blip"), [buffer.getvalue(), PHOTOS[1]])) == 2


def save_text_model(folder):
    shutil.rmtree(folder)
    transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)).save_pretrained(folder)


def save_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def save_with_prompt(folder):
    """A model that answers questions: without one it does nothing."""
    shutil.rmtree(folder)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(vocab_size=len(VOCABULARY) + 1, **LAYERS),
        image_token_index=len(VOCABULARY),
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    words = tokenizer()
    words.add_tokens(["<image>"])
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    transformers.LlavaProcessor(images, words, patch_size=8).save_pretrained(folder)


def drop_a_tensor(folder):
    model = transformers.BlipForConditionalGeneration.from_pretrained(folder)
    tensors = model.state_dict()
    del tensors["vision_model.post_layernorm.weight"]
    model.save_pretrained(folder, state_dict=tensors)


def widen(folder):
    config = transformers.BlipConfig.from_pretrained(folder)
    config.vision_config.intermediate_size = 64
    config.save_pretrained(folder)


def delete(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


class TestFolders:
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (shutil.rmtree, "There is no model at|There is no local model|no model"),
            (delete("config.json"), "holds no model that can be loaded"),
            (lambda folder: (folder / "config.json").write_text("{"), "holds no model that can be loaded"),
            (save_text_model, "is of type 'bert'. Expected an image captioner"),
            (save_pickle, r"only pytorch_model\.bin, a pickle, which is not loaded.*convert it"),
            (delete("model.safetensors"), "holds no weights"),
            (
                lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99),
                "weights in .* cannot be loaded",
            ),
            (drop_a_tensor, r"1 tensors are missing \(vision_model\.post_layernorm\.weight\)"),
            (widen, "weights in .* cannot be loaded"),
            (delete("processor_config.json"), "processor in .* cannot be loaded"),
            (delete("tokenizer.json", "tokenizer_config.json"), "processor in .* cannot be loaded"),
            (save_with_prompt, "cannot caption an image with these options.*needs no prompt"),
        ],
    )
    def test_what_is_wrong_is_said_in_one_paragraph(self, folder, damage, message):
        damage(folder)
        with pytest.raises(ModelError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)

    def test_a_device_that_there_is_not(self, folders):
        with pytest.raises(ModelError, match="`device`"):
            HuggingFaceCaptioner.load(str(folders / "blip"), CaptionOptions(), "cuda:99")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_do_not_fit(folders, family, tmp_path):
    folder = shutil.copytree(folders / family, tmp_path / family)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(
        {**tensors, "foo.bar": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"1 tensors are foreign \(foo\.bar\)"):
        load(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("words", [8, 50])
def test_a_vocabulary_that_does_not_fit(folders, family, words, tmp_path):
    folder = shutil.copytree(folders / family, tmp_path / family)
    saved = json.loads((folder / "tokenizer.json").read_bytes())
    vocabulary = saved["model"]["vocab"]
    more = {f"word{i}": i for i in range(len(vocabulary), words)}
    saved["model"]["vocab"] = {w: n for w, n in vocabulary.items() if n < words} | more
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(ModelError, match=f"does not fit: the tokenizer has {words} tokens, the model says 2"):
        load(folder)


def test_lists_of_generation_stay_lists(folders):
    given = (("bad_words_ids", ((5,), (6,))),)
    captioner = load(folders / "git", dataclasses.replace(OPTIONS["beam"], generation=given))
    assert captioner._flags["bad_words_ids"] == [[5], [6]]
