import argparse
import dataclasses
from typing import Any

import pytest

from diptych.models.base import CaptionOptions, ImageOptions, TextOptions
from diptych.models.spec import ModelSpec
from diptych.pipelines.options.generate import GenerateOptions, add_generate_flags, generate_options
from diptych.pipelines.options.models import (
    ModelJobOptions,
    add_caption_flags,
    add_embed_flags,
    caption_options,
    embed_options,
)
from diptych.pipelines.options.prepare import PrepareOptions, add_prepare_flags, prepare_options
from diptych.pipelines.runners.beam_flags import check_beam_args
from diptych.transforms.clean import CleanOptions
from diptych.transforms.errors import OptionError
from diptych.transforms.images.decode import Limits
from diptych.transforms.images.resize import IMAGENET_MEAN, IMAGENET_STD, ResizeOptions
from diptych.transforms.sources.base import ColumnNames
from diptych.transforms.sources.open import FORMATS, SourceOptions


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_prepare_flags(made)
    return made


def parse(*flags: str) -> PrepareOptions:
    return prepare_options(parser().parse_args(["--input", "a", "--output", "b", *flags]), ())


def own_flags() -> list[str]:
    return [flag for action in parser()._actions for flag in action.option_strings]


class TestFlags:
    def test_defaults_are_those_of_the_classes(self):
        assert parse() == PrepareOptions(("a",), "b")
        assert parse().resize == ResizeOptions()
        assert parse().clean == CleanOptions()
        assert parse().source == SourceOptions()

    def test_every_flag_has_its_place(self):
        options = parse(
            *("--input=c", "--format=parquet", "--images=d", "--split=train,val", "--image_column=e"),
            *("--caption_column=f", "--key_column=g", "--metadata_columns= h, i,", "--lowercase"),
            *(
                "--min_caption_chars=2",
                "--max_caption_chars=3",
                "--require_caption",
                "--size=64",
                "--resize=pad",
            ),
            *("--image_format=png", "--quality=90", "--pixels=float32", "--pixel_mean=0.1,0.2,0.3"),
            *("--pixel_std=1,2,3", "--max_pixels=1000", "--min_side_px=5", "--max_aspect_ratio=3.5"),
            "--max_image_bytes=7000",
            *("--keep_rejected_bytes", "--chunk_rows=10", "--overwrite", "--quiet"),
        )
        assert options == PrepareOptions(
            inputs=("a", "c"),
            output="b",
            format="parquet",
            source=SourceOptions("d", "train,val", ColumnNames("e", "f", "g"), ("h", "i")),
            clean=CleanOptions(True, 2, 3, True, True),
            resize=ResizeOptions(
                64, "pad", "png", 90, "float32", (0.1, 0.2, 0.3), (1, 2, 3), Limits(1000, 5, 3.5, 7000), True
            ),
            chunk_rows=10,
            overwrite=True,
            quiet=True,
        )

    def test_every_flag_says_what_it_does(self):
        assert [action.dest for action in parser()._actions if not action.help] == []

    def test_beam_flags_are_kept(self):
        args = parser().parse_args(["--input", "a", "--output", "b"])
        assert prepare_options(args, ["--runner=X"]).beam_args == ("--runner=X",)

    @pytest.mark.parametrize("format", ["auto", *FORMATS])
    def test_formats(self, format):
        assert parse(f"--format={format}").format == format

    @pytest.mark.parametrize("text", ["1,2", "1,2,3,4", "a,b,c", "", "1;2;3"])
    def test_three_numbers_are_three(self, text):
        with pytest.raises(argparse.ArgumentError, match="is not three numbers"):
            parse(f"--pixel_mean={text}")

    def test_a_flag_may_not_be_shortened(self):
        _, unknown = parser().parse_known_args(["--input=a", "--output=b", "--chunk=3"])
        assert unknown == ["--chunk=3"]


class TestBounds:
    @pytest.mark.parametrize(
        ("flag", "value", "expected"),
        [
            ("--output", "", "a path or URL"),
            ("--output", "  ", "a path or URL"),
            ("--input", "", "a path or URL"),
            ("--chunk_rows", "0", "at least 1"),
            ("--chunk_rows", "100001", "at most 100000"),
            ("--size", "0", "between 1 and 4096"),
            ("--size", "4097", "between 1 and 4096"),
            ("--quality", "0", "between 1 and 100"),
            ("--quality", "101", "between 1 and 100"),
            ("--max_pixels", "0", "at least 1"),
            ("--max_image_bytes", "0", "between 1 and 67108864"),
            ("--min_side_px", "0", "at least 1"),
            ("--max_aspect_ratio", "0.9", "at least 1"),
            ("--max_aspect_ratio", "nan", "at least 1"),
            ("--pixel_mean", "0,nan,0", "finite"),
            ("--pixel_std", "1,0,1", "above 0"),
            ("--pixel_std", "1,inf,1", "finite"),
            ("--min_caption_chars", "0", "at least 1"),
            ("--max_caption_chars", "0", "at least --min_caption_chars 1"),
        ],
    )
    def test_a_value_out_of_bounds_is_named_with_them(self, flag, value, expected):
        with pytest.raises(OptionError, match=f"{flag} is .*{expected}"):
            parse(f"{flag}={value}")

    @pytest.mark.parametrize(
        "flag",
        ["--chunk_rows=1", "--chunk_rows=100000", "--size=1", "--size=4096", "--quality=1", "--quality=100"],
    )
    def test_the_bounds_themselves_are_allowed(self, flag):
        parse(flag)

    def test_hold_without_a_command_line_too(self):
        with pytest.raises(OptionError, match="--size is 0"):
            dataclasses.replace(PrepareOptions(("a",), "b"), resize=ResizeOptions(size_px=0))

    def test_the_means_are_imagenets(self):
        assert parse("--pixels=float32").resize.mean == IMAGENET_MEAN
        assert parse("--pixels=float32").resize.std == IMAGENET_STD


def parse_model_job(job: str, *flags: str) -> ModelJobOptions:
    add, options = {
        "embed": (add_embed_flags, embed_options),
        "caption": (add_caption_flags, caption_options),
        "generate": (add_generate_flags, generate_options),
    }[job]
    made = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add(made)
    assert [action.dest for action in made._actions if not action.help] == []
    kind = {"embed": "bert", "caption": "hf", "generate": "gan"}[job]
    source = "--prompts=a" if job == "generate" else "--input=a"
    return options(made.parse_args([source, "--output=b", f"--model={kind}:x", *flags]), ("--runner=X",))


class TestModelFlags:
    def test_defaults_are_those_of_the_classes(self):
        shared = {"inputs": ("a",), "output": "b", "beam_args": ("--runner=X",)}
        embed = ModelJobOptions(**shared, model=ModelSpec("bert", "x", TextOptions()))
        assert parse_model_job("embed") == embed
        caption = ModelJobOptions(**shared, model=ModelSpec("hf", "x", CaptionOptions()))
        assert parse_model_job("caption") == caption
        generate = GenerateOptions(**shared, model=ModelSpec("gan", "x", ImageOptions()))
        assert parse_model_job("generate") == generate

    def test_every_flag_of_generate_has_its_place(self):
        made = parse_model_job(
            *(
                "generate",
                "--device=cpu",
                "--seed=3",
                "--images_per_prompt=4",
                "--size=96",
                "--image_format=jpeg",
            ),
            *("--quality=80", "--text_model=bert:t", "--setting=a=[1, 2]", '--setting=b="x"'),
            *("--min_match=0.3", "--match_with=cnn-lstm:c", "--match_by=word2vec:w", "--batch_size=5"),
        )
        assert made.model.options == ImageOptions(96, "jpeg", 80, "bert:t", (("a", (1, 2)), ("b", "x")))
        assert (made.seed, made.images_per_prompt, made.min_match, made.batch_size) == (3, 4, 0.3, 5)
        assert made.match_with == ModelSpec("cnn-lstm", "c", CaptionOptions(), "cpu")
        assert made.match_by == ModelSpec("word2vec", "w", TextOptions(), "cpu")

    def test_every_flag_has_its_place(self):
        shared = ("--device=cuda:1", "--batch_size=7", "--max_failure_rate=0.5", "--chunk_rows=9")
        embed = parse_model_job("embed", *shared, "--pooling=cls", "--normalize", "--key_column=k")
        assert embed.model == ModelSpec("bert", "x", TextOptions("cls", True), "cuda:1")
        assert (embed.batch_size, embed.max_failure_rate, embed.chunk_rows) == (7, 0.5, 9)
        assert embed.source == SourceOptions(columns=ColumnNames(key="k"))
        caption = parse_model_job(
            "caption",
            *("--beam_width=5", "--num_captions=2", "--max_words=9", "--length_penalty=0.5"),
            *("--no_repeat_ngram=3", "--features", "--generation=top_k=5", '--generation=prefix="a b"'),
            "--generation=bad_words_ids=[[1, 2], [3]]",
        )
        generation = (("top_k", 5), ("prefix", "a b"), ("bad_words_ids", ((1, 2), (3,))))
        assert caption.model.options == CaptionOptions(5, 2, 9, 0.5, 3, True, generation)
        assert hash(caption.model)

    def test_a_location_may_hold_colons(self):
        assert parse_model_job("embed", "--model=bert:gs://b/m:1").model.location == "gs://b/m:1"

    @pytest.mark.parametrize("text", ["top_k", "=5", "a b=1"])
    def test_a_setting_is_a_name_and_a_value(self, text):
        with pytest.raises(argparse.ArgumentError, match="is not NAME=VALUE"):
            parse_model_job("caption", f"--generation={text}")

    @pytest.mark.parametrize("text", ["name=word", "name=", 'name={"a": 1}'])
    def test_a_value_is_json(self, text):
        with pytest.raises(argparse.ArgumentError, match="the value is not JSON that can be passed on"):
            parse_model_job("caption", f"--generation={text}")

    @pytest.mark.parametrize(
        ("job", "flag", "expected"),
        [
            ("caption", "--beam_width=0", "--beam_width is 0. It must be at least 1"),
            ("caption", "--num_captions=4", "--num_captions is 4. It must be between 1 and --beam_width 3"),
            ("caption", "--num_captions=0", "--num_captions is 0"),
            ("caption", "--max_words=0", "--max_words is 0"),
            ("caption", "--length_penalty=nan", "--length_penalty is nan. It must be .*finite"),
            ("caption", "--no_repeat_ngram=-1", "--no_repeat_ngram is -1"),
            ("embed", "--batch_size=0", "--batch_size is 0. It must be at least 1"),
            ("embed", "--max_failure_rate=-0.1", "--max_failure_rate is -0.1. It must be between 0 and 1"),
            ("embed", "--max_failure_rate=nan", "--max_failure_rate is nan"),
            ("embed", "--device=cuda:x", "--device is cuda:x. It must be auto, cpu, cuda or cuda:N"),
            ("embed", "--model=hf:x", "KIND is word2vec or bert"),
            ("caption", "--model=bert:x", "KIND is cnn-lstm, cnn-rnn or hf"),
            ("caption", "--chunk_rows=0", "--chunk_rows is 0"),
        ],
    )
    def test_a_value_out_of_bounds_is_named_with_them(self, job, flag, expected):
        with pytest.raises(OptionError, match=expected):
            parse_model_job(job, flag)

    def test_metadata_columns_are_for_prepare(self):
        spec = ModelSpec("bert", "x", TextOptions())
        with pytest.raises(OptionError, match="--metadata_columns is url"):
            ModelJobOptions(("a",), "b", source=SourceOptions(metadata_columns=("url",)), model=spec)


FLINK = ("--runner=FlinkRunner", "--flink_master=[local]")


class TestCheckBeamArgs:
    @pytest.mark.parametrize(
        "flags",
        [
            (),
            ("--direct_num_workers=1",),
            ("--direct_num_workers", "2", "--direct_running_mode=multi_threading"),
            ("--runner=DataflowRunner", "--project=p", "--temp_location=gs://b/t", "--region=r"),
            (*FLINK, "--parallelism=2", "--number_of_execution_retries=3"),
            (*FLINK, "--a_setting_of_the_job_server", "value"),
        ],
    )
    def test_flags_of_beam_pass(self, flags):
        check_beam_args(flags, own_flags())

    @pytest.mark.parametrize(
        ("flags", "wrong", "meant"),
        [
            (["--chunk_row=3"], "--chunk_row=3", "--chunk_rows"),
            (["--ouput=x"], "--ouput=x", "--output"),
            (["--overwite"], "--overwite", "--overwrite"),
            (["--runer=FlinkRunner"], "--runer=FlinkRunner", "--runner"),
            (["--direct_num_worker=2"], "--direct_num_worker=2", "--direct_num_workers"),
            ([*FLINK, "--chunk_row=3"], "--chunk_row=3", "--chunk_rows"),
            ([*FLINK, "--paralelism=3"], "--paralelism=3", "--parallelism"),
        ],
    )
    def test_a_misspelt_flag_is_refused_with_what_was_meant(self, flags, wrong, meant):
        with pytest.raises(OptionError, match=f"{wrong} is no flag of this job.*Did you mean {meant}\\?"):
            check_beam_args(flags, own_flags())

    @pytest.mark.parametrize("flags", [["--zzzz"], ["word"], ["-q"], ["--"], [*FLINK, "-q"]])
    def test_what_is_like_nothing_is_refused(self, flags):
        with pytest.raises(OptionError, match="is no flag of this job, nor one of Apache Beam"):
            check_beam_args(flags, own_flags())

    @pytest.mark.parametrize("flags", [["--direct_num_workers=many"], ["--direct_num_workers"]])
    def test_a_value_that_beam_refuses_is_one_line(self, flags, capsys):
        with pytest.raises(OptionError, match="argument --direct_num_workers"):
            check_beam_args(flags, own_flags())
        assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("columns", [("width", "url"), ("image",), ("path",), ("pixels",), ("url", "url")])
def test_metadata_columns_have_names_of_their_own(columns: tuple[str, ...]) -> None:
    with pytest.raises(OptionError, match="--metadata_columns is"):
        PrepareOptions(("in",), "out", source=SourceOptions(metadata_columns=columns))


@pytest.mark.parametrize(
    ("size_px", "pixels", "expected"),
    [(224, None, 250), (224, "float32", 250), (512, "uint8", 50), (4096, None, 7)],
)
def test_large_pictures_make_small_chunks(size_px: int, pixels: Any, expected: int) -> None:
    options = PrepareOptions(("in",), "out", resize=ResizeOptions(size_px=size_px, pixels=pixels))
    assert options.rows_per_chunk == expected
