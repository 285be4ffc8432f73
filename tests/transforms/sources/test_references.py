import json

import pytest

from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.sources.references import read_references

SAID = {"2_b": ["A dog .", "One dog"], "1_a": ["A cat, black"], "3_c": []}


def coco(folder, said):
    path = folder / "captions_val2017.json"
    images = [{"id": 100 + i, "file_name": f"{key}.jpg"} for i, key in enumerate(said)]
    annotations = [
        {"id": i, "image_id": 100 + i, "caption": text}
        for i, texts in enumerate(said.values())
        for text in texts
    ]
    # captions first, as COCO itself has them in some files
    path.write_text(json.dumps({"annotations": annotations[::-1], "images": images}))
    return path


def karpathy(folder, said):
    path = folder / "dataset_flickr8k.json"
    images = [
        {
            "filename": f"{key}.jpg",
            "filepath": "x",
            "split": "test",
            "sentences": [{"raw": text} for text in texts],
        }
        for key, texts in said.items()
    ]
    other = {"filename": "9_z.jpg", "split": "train", "sentences": [{"tokens": ["a", "bird"]}]}
    path.write_text(json.dumps({"images": [*images, other]}))
    return path


def tokens(folder, said):
    path = folder / "Flickr8k.token.txt"
    lines = [f"{key}.jpg#{i}\t{text}" for key, texts in said.items() for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return path


def table(folder, said):
    path = folder / "captions.txt"
    lines = [f'{key}.jpg,"{text}"' for key, texts in said.items() for text in texts]
    path.write_text("\n".join(["image,caption", *lines]))
    return path


FILES = [coco, karpathy, tokens, table]


@pytest.mark.parametrize("write", FILES)
def test_captions_by_key_whatever_the_file(tmp_path, write):
    references = read_references(str(write(tmp_path, SAID)), split="test" if write is karpathy else None)
    said = {key: texts for key, texts in SAID.items() if texts}
    assert {key: sorted(texts) for key, texts in references.captions.items()} == {
        key: sorted(texts) for key, texts in said.items()
    }
    assert references.image_ids == ({"2_b": 100, "1_a": 101, "3_c": 102} if write is coco else {})
    assert references.num_bad == 0


def test_all_splits_and_tokens_where_there_is_no_text(tmp_path):
    references = read_references(str(karpathy(tmp_path, SAID)))
    assert references.captions["9_z"] == ["a bird"]
    assert list(references.captions) == ["2_b", "1_a", "9_z"]


def test_a_folder_and_a_glob(tmp_path):
    (tmp_path / "annotations").mkdir()
    coco(tmp_path / "annotations", SAID)
    expected = read_references(str(tmp_path / "annotations" / "captions_val2017.json"))
    assert read_references(str(tmp_path)) == expected
    assert read_references(str(tmp_path / "annotations" / "captions_*.json")) == expected


def test_two_images_of_one_name_have_keys_of_their_own(tmp_path):
    images = [
        {"filename": "a.jpg", "split": "val", "sentences": [{"raw": "not asked for"}]},
        {"filename": "a.jpg", "split": "test", "sentences": [{"raw": "first"}]},
        {"filename": "b/a.jpg", "split": "test", "sentences": [{"raw": "second"}]},
    ]
    (tmp_path / "dataset_x.json").write_text(json.dumps({"images": images}))
    assert read_references(str(tmp_path), split="test").captions == {"a": ["first"], "b/a": ["second"]}


def test_ids_of_another_type_and_entries_of_one_file(tmp_path):
    images = [
        {"id": "1", "file_name": "a.jpg"},
        {"id": 2**70, "file_name": "a.jpg"},
        {"id": 3.0, "file_name": "b.jpg"},
    ]
    captions = [
        {"image_id": 1, "caption": "one"},
        {"image_id": 2**70, "caption": "two"},
        {"image_id": 3, "caption": "x"},
    ]
    (tmp_path / "captions_x.json").write_text(json.dumps({"images": images, "annotations": captions}))
    references = read_references(str(tmp_path / "captions_x.json"))
    assert references == ({"a": ["one", "two"], "b": ["x"]}, {"a": "1", "b": 3}, 0)


def test_what_cannot_be_read_is_counted(tmp_path):
    path = tokens(tmp_path, SAID)
    path.write_text(path.read_text() + "no tab here\n4_d.jpg#0\t   \n")
    references = read_references(str(path))
    assert references.num_bad == 1
    assert "4_d" not in references.captions


def test_no_annotation_is_said_to_be_none(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x")
    with pytest.raises(InputError, match=r"--references .*a\.tar is no annotation"):
        read_references(str(tmp_path / "a.tar"))
    with pytest.raises(InputError, match="is not there"):
        read_references(str(tmp_path / "gone.json"))
    (tmp_path / "instances.json").write_text('{"boxes": []}')
    with pytest.raises(InputError, match="is not a COCO caption annotation"):
        read_references(str(tmp_path / "instances.json"))


def test_a_split_that_there_is_not(tmp_path):
    with pytest.raises(OptionError, match="has no split dev"):
        read_references(str(karpathy(tmp_path, SAID)), split="dev")
    with pytest.raises(OptionError, match="--split test goes with a Karpathy file"):
        read_references(str(coco(tmp_path, SAID)), split="test")
