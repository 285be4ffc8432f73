"""Scores what a job wrote: `diptych evaluate captions --input OUT --references captions_val2017.json`.

Candidates and references are cut into words in one way, the COCO evaluation's (`diptych.models.metrics.ptb_tokenizer`),
whatever file they are from. In memory are the texts and their words; a row's image is never read.
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from diptych.models.errors import one_line
from diptych.models.files.location import redacted
from diptych.models.metrics.caption_scores import score_captions
from diptych.models.metrics.ptb_tokenizer import tokenize
from diptych.pipelines.options.evaluate import EvaluateCaptionsOptions
from diptych.transforms.errors import InputError, OutputError
from diptych.transforms.finish import read_success
from diptych.transforms.output_layout import JOB, SUCCESS, data_files, read_json
from diptych.transforms.sink import READ_ERRORS
from diptych.transforms.sources.planned.entries import Ref
from diptych.transforms.sources.references import References, read_references
from diptych.transforms.storage import input_errors, join, locate, make_folder_of, write_json

_NAMES = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
}
# COCO's file names: 2014 with the split, 2017 the number alone
_COCO_KEY = re.compile(r"(?:COCO_\w+20\d\d_)?(\d{12})")


class Candidate(NamedTuple):
    """What a captioner said of an image.

    Attributes:
        key: Of the image.
        caption: The best caption.
        references: The captions that the output has of it; None where it has no such column.
    """

    key: str
    caption: str
    references: Sequence[str] | None


def evaluate_captions(options: EvaluateCaptionsOptions) -> dict[str, Any]:
    """Scores the captions of an output, and writes the files that are asked for.

    Returns:
        `scores` as `diptych.models.metrics.caption_scores` has them (None where there are no references, and results
        are asked for), and the counts that say what they are of, as JSON values.

    Raises:
        InputError: There are no finished captions, no references, or none of them is of the same image.
        OutputError: A file cannot be written, or the output is damaged.
    """
    for url in filter(None, (options.results, options.scores)):  # before the scoring, which may take long
        make_folder_of(url)
    candidates = list(read_candidates(options.input))
    if not candidates:
        raise InputError(f"{join(options.input, 'captions')} holds no row. There is nothing to score.")
    unique = list({candidate.key: candidate for candidate in reversed(candidates)}.values())[::-1]
    file = options.references and read_references(options.references, options.format, options.split)
    captions = file.captions if file else {c.key: c.references for c in unique if c.references}
    pairs = [(candidate, captions[candidate.key]) for candidate in unique if candidate.key in captions]
    if not pairs and (file or not options.results):
        raise _no_pair(options, unique, file or None)
    report = {
        "input": redacted(options.input),
        "references": redacted(options.references or join(options.input, "captions")),
        "scores": _score(pairs) if pairs else None,
        "num_scored": len(pairs),
        "num_references": sum(len(row) for _, row in pairs),
        "num_without_references": len(unique) - len(pairs),
        "num_without_candidate": len(captions) - len(pairs),
        "num_repeated_keys": len(candidates) - len(unique),
        "num_bad_references": file.num_bad if file else 0,
    }
    if options.results:
        write_json(options.results, _results(unique, file.image_ids if file else {}))
    if options.scores:
        write_json(options.scores, report)
    return report


def read_candidates(root: str) -> Iterator[Candidate]:
    """Yields what a finished job wrote to `OUT/captions`, a batch in memory at a time.

    Raises:
        InputError: There is no such output, or it has no captions, or is not finished.
        OutputError: A file of it is damaged.
    """
    if read_json(root, JOB) is None:
        raise InputError(
            f"{root} has no {JOB}, so it is not the output of a job. Expected the --output of `diptych caption`."
        )
    totals, names = read_success(root), data_files(root, "captions")
    if not names and "captions" not in (totals or {}):
        raise InputError(f"{root} holds no captions. Expected the --output of `diptych caption`.")
    if "captions" not in (totals or {}):
        raise InputError(
            f"{root} has no {SUCCESS}: the job that writes its captions has not finished. Run it again, then score."
        )
    for name in names:
        url = join(root, "captions", name)
        try:
            yield from _read_file(url)
        except READ_ERRORS as error:
            what = one_line(error)
            raise OutputError(f"{url} cannot be read: {what}. Delete it, and run the job again.") from error


def _read_file(url: str) -> Iterator[Candidate]:
    with input_errors(url):
        fs, path = locate(url)
        with fs.open(path, "rb") as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            columns = ["key", "caption"]
            if "references" in parquet.schema_arrow.names:
                columns.append("references")
            for batch in parquet.iter_batches(1024, columns=columns):
                for row in batch.to_pylist():
                    yield Candidate(row["key"], row["caption"] or "", row.get("references"))


def _score(pairs: Sequence[tuple[Candidate, Sequence[str]]]) -> dict[str, float]:
    return score_captions(
        [tokenize(candidate.caption) for candidate, _ in pairs],
        [[tokenize(text) for text in row] for _, row in pairs],
    )


def _no_pair(
    options: EvaluateCaptionsOptions, candidates: Sequence[Candidate], file: References | None
) -> InputError:
    where = join(options.input, "captions")
    if file is None:
        return InputError(
            f"{where} has no references of its own, so there is nothing to score against. Name an annotation with "
            "--references."
        )
    if not file.captions:
        return InputError(
            f"--references {options.references} holds no caption that can be read. Name another."
        )
    return InputError(
        f"None of the {len(candidates):,} captions in {where} is of an image in --references {options.references}: a "
        f"key there is {candidates[0].key!r}, here {next(iter(file.captions))!r}. Name the annotation of these images."
    )


def _results(candidates: Sequence[Candidate], image_ids: Mapping[str, Ref]) -> list[dict[str, Any]]:
    """Returns COCO results; beside a COCO annotation, of its images alone, or its tools refuse them."""
    return [
        {"image_id": image_ids.get(row.key, _image_id(row.key)), "caption": row.caption}
        for row in candidates
        if not image_ids or row.key in image_ids
    ]


def _image_id(key: str) -> int | str:
    match = _COCO_KEY.fullmatch(key)
    return int(match[1]) if match else key


def report(scores: Mapping[str, Any], args: argparse.Namespace, _: float) -> str:
    """Returns what the command prints."""
    return json.dumps(scores) if args.json else table(scores)


def table(report: Mapping[str, Any]) -> str:
    """Returns a report of `evaluate_captions` for people."""
    scores = report["scores"] or {}
    note = ["CIDEr weighs words by how few of the images have them: of one image alone it is 0 by definition"]
    lines = [
        f"{report['num_scored']:,} captions of {report['input']} against {report['num_references']:,} references of "
        f"{report['references']}",
        *(f"{_NAMES[name]:8} {value:.4f}" for name, value in scores.items()),
        *(note if scores and report["num_scored"] == 1 else []),
    ]
    counts = {
        "captions without references, not scored": report["num_without_references"],
        "images with references and no caption": report["num_without_candidate"],
        "captions of a key that occurs before, not scored": report["num_repeated_keys"],
        "parts of the references that cannot be read": report["num_bad_references"],
    }
    lines += [f"{count:,} {what}" for what, count in counts.items() if count]
    return "\n".join(lines)
