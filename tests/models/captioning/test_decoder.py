import itertools

import pytest
import torch

from diptych.models.captioning.decoder import Decoder, DecoderConfig
from diptych.models.captioning.vocabulary import END, PAD, START

CELLS = ("lstm", "gru", "rnn")


def decoder(cell="lstm", attention=True, **options):
    torch.manual_seed(0)
    config = DecoderConfig(
        cell, attention, 9, 6, 4, embedding_dim=8, hidden_dim=10, attention_dim=5, **options
    )
    return Decoder(config).eval()


REGIONS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
WORDS = torch.tensor(
    [
        [START, 5, END, PAD, PAD],
        [START, 6, 7, 8, END],
        [START, 4, 4, END, PAD],
        [START, 8, END, PAD, PAD],
    ]
)
OWNERS = torch.tensor([0, 1, 1, 2])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("attention", [True, False])
class TestDecoder:
    def test_teacher_forcing_is_the_steps_one_after_the_other(self, cell, attention):
        model = decoder(cell, attention)
        logits, targets, _ = model(REGIONS, OWNERS, WORDS)
        found = -torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        expected = 0.0
        for owner, words in zip(OWNERS.tolist(), WORDS.tolist(), strict=True):
            features = model.encode_image(REGIONS[owner : owner + 1])
            state = model.init_state(features)
            for word, following in itertools.pairwise(words):
                if following == PAD:
                    break
                output, state = model.step(torch.tensor([word]), state, features)
                expected += torch.log_softmax(model.logits(output), 1)[0, following].item()
        assert found.item() == pytest.approx(expected, abs=1e-4)

    def test_counts_every_word_and_end_once(self, cell, attention):
        logits, targets, _ = decoder(cell, attention)(REGIONS, OWNERS, WORDS)
        assert logits.shape == (len(targets), 9)
        assert sorted(targets.tolist()) == sorted(n for n in WORDS[:, 1:].flatten().tolist() if n != PAD)

    def test_every_weight_learns(self, cell, attention):
        model = decoder(cell, attention)
        logits, targets, _ = model(REGIONS, OWNERS, WORDS)
        torch.nn.functional.cross_entropy(logits, targets).backward()
        silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # a GRU or RNN has no cell state to begin with, and Show and Tell begins from the image alone
        assert silent == ([] if attention else ["start.weight", "start.bias"])

    def test_the_image_matters(self, cell, attention):
        model = decoder(cell, attention)
        one, *_ = model(REGIONS, OWNERS, WORDS)
        other, *_ = model(REGIONS.roll(1, 0), OWNERS, WORDS)
        assert (one - other).abs().max() > 1e-3


def test_regions_have_a_place_with_attention_only():
    shuffled = REGIONS[:, [2, 0, 3, 1]]
    for attention in (True, False):
        model = decoder(attention=attention)
        if attention:
            torch.nn.init.normal_(model.places)
        one, other = model(REGIONS, OWNERS, WORDS)[0], model(shuffled, OWNERS, WORDS)[0]
        assert torch.allclose(one, other, atol=1e-5) is not attention
    near = torch.cat([REGIONS[:, :1] * 3, REGIONS[:, 1:] - REGIONS[:, :1] * 2 / 3], dim=1)  # the same mean
    pooled, attending = decoder(attention=False), decoder(attention=True)
    assert torch.allclose(pooled(REGIONS, OWNERS, WORDS)[0], pooled(near, OWNERS, WORDS)[0], atol=1e-5)
    assert not torch.allclose(
        attending(REGIONS, OWNERS, WORDS)[0], attending(near, OWNERS, WORDS)[0], atol=1e-3
    )
