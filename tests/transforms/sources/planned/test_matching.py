import pytest

from diptych.transforms.sources.planned.matching import of_other_type, original_ref, quoted, stored_ref


@pytest.mark.parametrize("ref", [0, -1, 2**63 - 1, 2**63, -(2**63) - 1, 10**300, "1", "", "é", 1.5])
def test_ids_survive_the_database(ref):
    stored = stored_ref(ref)
    assert original_ref(stored) == ref
    assert not isinstance(stored, int) or -(2**63) <= stored < 2**63


def test_a_number_has_one_form():
    assert stored_ref(1.0) == stored_ref(1)
    assert stored_ref(1e20) == stored_ref(10**20) == b"100000000000000000000"


@pytest.mark.parametrize(
    ("ref", "other"),
    [
        (1, "1"),
        ("1", 1),
        ("1.0", 1),
        ("-7", -7),
        (b"99999999999999999999", "99999999999999999999"),
        ("99999999999999999999", b"99999999999999999999"),
        ("001", None),
        ("1.5", None),
        (" 1", None),
        ("1e3", None),
        ("١", None),
        ("", None),
    ],
)
def test_the_same_id_of_another_type(ref, other):
    assert of_other_type(ref) == other


def test_messages_tell_texts_from_numbers():
    assert [quoted(ref) for ref in (1, "1", 'a"é', 1.5, b"99999999999999999999")] == [
        "1",
        '"1"',
        '"a\\"é"',
        "1.5",
        "99999999999999999999",
    ]
