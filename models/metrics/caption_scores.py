"""Scores captions against references: BLEU, ROUGE-L and CIDEr, as the COCO caption evaluation defines them.

`aac-metrics` computes the COCO evaluation's own values without Java and without its 100 MB package.
"""

from collections.abc import Sequence

SCORES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")


def score_captions(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> dict[str, float]:
    """Scores one candidate per image against the image's references.

    Args:
        candidates: The tokens of each candidate; a candidate may be empty.
        references: The tokenised references of each candidate, at least one each.

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
    # Imported here, because it loads several large libraries
    from aac_metrics.functional import bleu, cider_d, rouge_l

    candidate_texts = [" ".join(tokens) for tokens in candidates]
    reference_texts = [[" ".join(tokens) for tokens in row] for row in references]
    bleus, _ = bleu(candidate_texts, reference_texts, return_1_to_n=True)
    # Not `str.split`, with which it divides by zero at an empty reference
    rouges, _ = rouge_l(candidate_texts, reference_texts, tokenizer=lambda text: text.split(" "))
    # With one image, or without any word, every weight of CIDEr is 0
    is_weighted = len(candidates) > 1 and any(text.strip() for row in reference_texts for text in row)
    cider = float(cider_d(candidate_texts, reference_texts)[0]["cider_d"]) if is_weighted else 0.0
    values = [*bleus["bleu_1_to_4"].tolist(), float(rouges["rouge_l"]), cider]
    return dict(zip(SCORES, values, strict=True))
