"""Scores of captions against references: BLEU, ROUGE-L and CIDEr, as the COCO caption evaluation defines them.

The arithmetic is that of `aac-metrics`: the COCO evaluation's own, without Java and without its 100 MB package.
"""

from collections.abc import Sequence

SCORES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")


def score_captions(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> dict[str, float]:
    """Scores one candidate an image against the image's references.

    Args:
        candidates: The tokens of each candidate; there may be none.
        references: The tokenised references of each candidate, at least one each, in any number.

    Returns:
        The value of each of `SCORES` over all the images: BLEU of the corpus (reference length: the closest), the
        means of ROUGE-L and of CIDEr (CIDEr-D, document frequencies from these references; at most 10).

    Raises:
        ValueError: There is nothing to score, a row has no reference, or the lengths differ.
    """
    if not candidates or len(candidates) != len(references):
        raise ValueError(
            f"{len(candidates)} candidates and {len(references)} rows of references. "
            "Expected as many of one as of the other, and at least 1."
        )
    if not all(references):
        raise ValueError(
            f"{sum(not row for row in references)} of {len(references)} rows have no reference. Leave them out."
        )
    # It brings several large libraries with it: only who scores waits for them
    from aac_metrics.functional import bleu, cider_d, rouge_l

    texts = [" ".join(tokens) for tokens in candidates]
    wanted = [[" ".join(tokens) for tokens in row] for row in references]
    bleus, _ = bleu(texts, wanted, return_1_to_n=True)
    # Not `str.split`: of a reference without a token it divides by zero
    rouges, _ = rouge_l(texts, wanted, tokenizer=lambda text: text.split(" "))
    # In a corpus of one image, or without a word, no word tells images apart: every weight is 0
    is_weighted = len(texts) > 1 and any(text.strip() for row in wanted for text in row)
    cider = float(cider_d(texts, wanted)[0]["cider_d"]) if is_weighted else 0.0
    values = [*bleus["bleu_1_to_4"].tolist(), float(rouges["rouge_l"]), cider]
    return dict(zip(SCORES, values, strict=True))
