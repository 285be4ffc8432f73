import csv
import io
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.transforms.chunk import Reject
from diptych.transforms.errors import OptionError
from diptych.transforms.sources.base import ColumnNames, Row
from diptych.transforms.sources.open import SourceOptions, open_source
from diptych.transforms.sources.planned.entries import Caption
from diptych.transforms.sources.planned.flickr30k import Flickr30kSource, is_of_images
from diptych.transforms.sources.planned.plan import plan_counters


def plan(folder, text, files=("a.jpg", "b.jpg"), name="results.token"):
    """Returns the shards of a caption file beside `images`."""
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "images").mkdir(exist_ok=True)
    for file in files:
        (folder / "images" / file).write_bytes(file.encode())
    return Flickr30kSource((str(folder / name),), str(folder)).shards(str(folder / "plans"), 10)


def read(shards):
    return [record for shard in shards for record in shard.rows()]


def captions_of(records):
    return {record.key: list(record.captions) for record in records if isinstance(record, Row)}


def lost(records):
    return [(record.key, record.row, record.reason) for record in records if isinstance(record, Reject)]


EXPECTED = {"a": ["A dog, running.", 'A "big" dog | runs'], "b": ["Two cats"]}

SHAPES = {
    "token": 'a.jpg#0\tA dog, running.\na.jpg#1\tA "big" dog | runs\nb.jpg#0\tTwo cats\n',
    "pipe": (
        "image_name| comment_number| comment\n"
        'a.jpg| 0| A dog, running.\na.jpg| 1| A "big" dog | runs\nb.jpg| 0| Two cats\n'
    ),
    "comma": 'image,caption\na.jpg,"A dog, running."\na.jpg,"A ""big"" dog | runs"\nb.jpg,Two cats\n',
    "numbered": (
        'image_name,comment_number,comment\na.jpg,1,"A ""big"" dog | runs"\n'
        'a.jpg,0,"A dog, running."\nb.jpg,0,Two cats\n'
    ),
    "raw": (
        "raw,sentids,split,filename,img_id\n"
        '"[""A dog, running."", ""A \\""big\\"" dog | runs""]","[0, 1]",train,a.jpg,0\n'
        '"[""Two cats""]",[2],train,b.jpg,1\n'
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_shape_gives_the_same_rows(tmp_path, shape, newline, mark):
    records = read(plan(tmp_path, mark + SHAPES[shape].replace("\n", newline)))
    assert captions_of(records) == EXPECTED
    assert [(record.row, record.image, record.source) for record in records] == [
        (0, b"a.jpg", "results.token"),
        (1, b"b.jpg", "results.token"),
    ]


@pytest.mark.parametrize("shape", ["pipe", "comma"])
def test_header_may_be_missing(tmp_path, shape):
    assert captions_of(read(plan(tmp_path, SHAPES[shape].partition("\n")[2]))) == EXPECTED


@pytest.mark.parametrize("shape", ["token", "pipe", "comma"])
def test_blank_lines_are_ignored(tmp_path, shape):
    text = "\n" + SHAPES[shape].replace("\n", "\n\n  \n")
    assert captions_of(read(plan(tmp_path, text))) == EXPECTED


def test_lines_may_stand_in_any_order(tmp_path):
    lines = "b.jpg#1\tb one\na.jpg#2\ta two\nb.jpg#0\tb zero\na.jpg#0\ta zero\n"
    records = read(plan(tmp_path, lines))
    assert [(record.key, record.captions) for record in records] == [
        ("b", ["b zero", "b one"]),
        ("a", ["a zero", "a two"]),
    ]


def test_number_that_is_given_twice_keeps_both_captions(tmp_path):
    assert captions_of(read(plan(tmp_path, "a.jpg#0\tone\na.jpg#0\tother\na.jpg#0\tone\n"))) == {
        "a": ["one", "other", "one"]
    }


def test_line_without_second_separator_is_repaired_and_counted(tmp_path):
    text = "image_name| comment_number| comment\na.jpg| 0| one\na.jpg| 4   A dog runs .\na.jpg| 1| two\n"
    shards = plan(tmp_path, text, files=["a.jpg"])
    assert captions_of(read(shards)) == {"a": ["one", "two", "A dog runs ."]}
    assert plan_counters(shards) == {"repaired_captions": 1}


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("a.jpg#0\tone", "a.jpg#1 no tab"),
        ("a.jpg#0\tone", "\tno name"),
        ("a.jpg#0\tone", "#1\tno name"),
        ("a.jpg| 0| one", "a.jpg no separator"),
        ("a.jpg| 0| one", "| 1| no name"),
        ("a.jpg| 0| one", "a.jpg| no number| two"),
        ("a.jpg| 0| one", "a.jpg| no number"),
        ("a.jpg,one", "no separator"),
        ("a.jpg,one", ",no name"),
        ("image,comment_number,caption\na.jpg,0,one", "a.jpg,x,two"),
        ("image,comment_number,caption\na.jpg,0,one", "a.jpg,1"),
        ('raw,filename\n"[""one""]",a.jpg', '"[one",a.jpg'),
        ('raw,filename\n"[""one""]",a.jpg', '"[1]",a.jpg'),
    ],
)
def test_line_that_cannot_be_parsed_is_lost_with_its_number(tmp_path, good, bad):
    number = good.count("\n") + 2
    records = read(plan(tmp_path, f"{good}\n{bad}\n"))
    assert captions_of(records) == {"a": ["one"]}
    assert lost(records) == [("", 1, "bad_annotation")]
    assert records[1].message.startswith(f"line {number}: ")


def test_lost_lines_stand_where_they_were(tmp_path):
    records = read(plan(tmp_path, "a.jpg#0\tone\nbad\nb.jpg#0\ttwo\nworse\na.jpg#1\tthree\n"))
    assert [(record.row, type(record).__name__) for record in records] == [
        (0, "Row"),
        (1, "Reject"),
        (2, "Row"),
        (3, "Reject"),
    ]


def test_quoted_caption_keeps_its_newlines(tmp_path):
    text = 'image,caption\r\na.jpg,"first\r\nsecond\n\nthird"\r\nb.jpg,x\r\n'
    assert captions_of(read(plan(tmp_path, text))) == {"a": ["first\nsecond\n\nthird"], "b": ["x"]}


@pytest.mark.parametrize("num_lines", [2, 5, 900])
def test_captions_of_many_lines(tmp_path, num_lines):
    names = [f"{number}.jpg" for number in range(60)]
    text = io.StringIO()
    caption = "\n".join(f'line {number}, "so"' for number in range(num_lines))
    csv.writer(text).writerows([("image", "caption"), *((name, caption) for name in names)])
    found = captions_of(read(plan(tmp_path, text.getvalue(), files=names)))
    assert found == {name[:-4]: [caption] for name in names}
    assert is_of_images(text.getvalue().splitlines()[:100])


def test_a_table_without_captions_is_refused(tmp_path):
    with pytest.raises(OptionError, match="one column only, 'image'"):
        plan(tmp_path, "image\na.jpg\nb.jpg\n")


def test_comma_that_is_not_quoted_belongs_to_the_caption(tmp_path):
    assert captions_of(read(plan(tmp_path, "image,caption\na.jpg,A dog, running, fast\n"))) == {
        "a": ["A dog, running, fast"]
    }


def test_quote_that_is_never_closed_does_not_swallow_lines_in_silence(tmp_path):
    text = 'image,caption\na.jpg,one\na.jpg,"never closed\nb.jpg,two\nb.jpg,"three"\nb.jpg,four\n'
    records = read(plan(tmp_path, text))
    assert captions_of(records)["a"] == ["one"]
    assert captions_of(records)["b"][-1] == "four"
    [reject] = [record for record in records if isinstance(record, Reject)]
    assert (reject.reason, "line 3" in reject.message) == ("bad_annotation", True)


def test_field_that_is_too_long_is_lost(tmp_path):
    text = "image,caption\na.jpg,one\na.jpg," + "x" * 200_000 + "\nb.jpg,two\n"
    records = read(plan(tmp_path, text))
    assert captions_of(records) == {"a": ["one"], "b": ["two"]}
    assert lost(records) == [("", 1, "bad_annotation")]


def test_image_that_is_missing_is_lost_once(tmp_path):
    # The line of Flickr8k.token.txt that names no photo
    text = "".join(f"2258277193_586949ec62.jpg.1#{i}\tpeople\n" for i in range(5)) + "a.jpg#0\tone\n"
    records = read(plan(tmp_path, text))
    assert lost(records) == [("2258277193_586949ec62.jpg", 0, "missing_image")]
    assert "5 captions" in records[0].message


def test_names_of_one_stem_are_told_apart_by_their_paths(tmp_path):
    records = read(
        plan(tmp_path, "a.jpg#0\tone\na.png#0\ttwo\nb.jpg#0\tx\n", files=["a.jpg", "a.png", "b.jpg"])
    )
    assert captions_of(records) == {"a.jpg": ["one"], "a.png": ["two"], "b": ["x"]}


def test_bytes_that_are_not_utf8_are_what_they_are(tmp_path):
    assert captions_of(read(plan(tmp_path, b"a.jpg#0\tcaf\xe9\n"))) == {"a": ["caf\xe9"]}


def test_lone_carriage_return_and_line_separators_stay_in_the_caption(tmp_path):
    text = "a.jpg#0\tone\rtwo\u2028three\x85four\x0bfive\n"
    assert captions_of(read(plan(tmp_path, text))) == {"a": ["one\rtwo\u2028three\x85four\x0bfive"]}


def test_unlisted_images_are_counted(tmp_path):
    shards = plan(tmp_path, "a.jpg#0\tone\n", files=["a.jpg", "b.jpg", "c.jpg", "Thumbs.db"])
    assert plan_counters(shards) == {"unlisted_images": 2}


@pytest.mark.parametrize("text", ["", "\n\n", "\ufeff", "image,caption\n"])
def test_no_captions_are_one_shard_without_rows(tmp_path, text):
    [shard] = plan(tmp_path, text)
    assert (shard.num_rows, list(shard.rows())) == (0, [])


@pytest.mark.parametrize("text", ["just some text\nand more\n", "{}", b"\x89PNG\r\n\x1a\n\0\0\0"])
def test_file_without_captions_says_what_was_seen_and_which_flags_decide(tmp_path, text):
    with pytest.raises(OptionError, match="expected lines such as"):
        plan(tmp_path, text)


@pytest.mark.parametrize(
    "folder",
    [
        "flickr30k-images",
        "flickr30k_images",
        "flickr30k_images/flickr30k_images",
        "Flicker8k_Dataset",
        "Flicker8k_Dataset/Flicker8k_Dataset",
        "images",
        "Images",
    ],
)
@pytest.mark.parametrize("above", ["", "text"])
def test_images_are_found_in_the_usual_places(tmp_path, folder, above):
    (tmp_path / folder).mkdir(parents=True)
    path = tmp_path / above / "captions.txt"
    path.parent.mkdir(exist_ok=True)
    assert Flickr30kSource((str(path),), str(tmp_path)).find_images(str(path)) == str(tmp_path / folder)


def no_surrogates(**options):
    return st.characters(exclude_categories=["Cs"], **options)


captions = st.lists(st.tuples(st.sampled_from(["a.jpg", "b.jpg"]), st.text(no_surrogates(), max_size=30)))


@given(captions)
def test_reads_what_the_csv_module_writes(tmp_path_factory, rows):
    rows = [(name, text.replace("\0", "")) for name, text in rows]
    text = io.StringIO()
    csv.writer(text).writerows([("image", "caption"), *rows])
    found = captions_of(read(plan(tmp_path_factory.mktemp("csv"), text.getvalue(), name="captions.txt")))
    expected = {}
    for name, caption in rows:
        expected.setdefault(name[0], []).append(caption)
    assert found == expected


@given(captions)
def test_reads_token_files(tmp_path_factory, rows):
    rows = [(name, text.replace("\n", " ").rstrip("\r")) for name, text in rows]
    text = "".join(f"{name}#{i}\t{caption}\n" for i, (name, caption) in enumerate(rows))
    found = captions_of(read(plan(tmp_path_factory.mktemp("token"), text)))
    expected = {}
    for name, caption in rows:
        expected.setdefault(name[0], []).append(caption)
    assert found == expected


@given(st.binary(max_size=200))
def test_rubbish_after_a_good_line_costs_no_more_than_itself(tmp_path_factory, rubbish):
    for first in (b"a.jpg#0\tone\n", b"a.jpg| 0| one\n", b"a.jpg,one\n"):
        records = read(plan(tmp_path_factory.mktemp("rubbish"), first + rubbish))
        assert records[0].captions[0] == "one"


def test_json_captions_with_half_a_surrogate(tmp_path):
    text = io.StringIO()
    csv.writer(text).writerows([("raw", "filename"), (json.dumps(["half \ud83d"]), "a.jpg")])
    assert captions_of(read(plan(tmp_path, text.getvalue()))) == {"a": ["half ?"]}


HEAD = "image,caption"


@pytest.mark.parametrize(
    "text",
    [
        "image,caption\na.jpg,one\nb.jpg,two\n",
        "image;caption\na.jpg;one\nb.jpg;two\n",
        "image\tcaption\na.jpg\tone\nb.jpg\ttwo\n",
        "image|caption\na.jpg|one\nb.jpg|two\n",
        "filepath,title\na.jpg,one\nb.jpg,two\n",
        "title\tfilepath\none\ta.jpg\ntwo\tb.jpg\n",
        ",image,caption\n0,a.jpg,one\n1,b.jpg,two\n",
        "Unnamed: 0,caption,file_name\n0,one,a.jpg\n1,two,b.jpg\n",
        "id,img,sentence,split\n1,a.jpg,one,train\n2,b.jpg,two,val\n",
        "IMAGE , Caption\na.jpg,one\nb.jpg,two\n",
        '"image","caption"\n"a.jpg","one"\n"b.jpg","two"\n',
        "a.jpg,one\nb.jpg,two\n",
        "one,a.jpg\ntwo,b.jpg\n",
        "foo,bar\na.jpg,one\nb.jpg,two\n",
        "image,caption\r\na.jpg,one\r\nb.jpg,two\r\n",
        "image,caption\ra.jpg,one\rb.jpg,two\r",
        "\ufeffimage,caption\na.jpg,one\nb.jpg,two",
        "image,caption\n\na.jpg,one\n\n\nb.jpg,two\n",
        "image,comment_number,comment\na.jpg,0,one\nb.jpg,0.0,two\n",
        "image_name| comment_number| comment\na.jpg| 0| one\nb.jpg| 0| two\n",
        "image~caption\na.jpg~one\nb.jpg~two\n",
        "a.jpg^one\nb.jpg^two\n",
        "caption\x01image\none\x01a.jpg\ntwo\x01b.jpg\n",
        "image caption\na.jpg one\nb.jpg two\n",
        "a.jpg#0 one\nb.jpg#0 two\n",
        "sep=;\nimage;caption\na.jpg;one\nb.jpg;two\n",
        "# by X, 2020\n# no licence\nimage,caption\na.jpg,one\nb.jpg,two\n",
        "# image,caption\na.jpg,one\nb.jpg,two\n",
        "image,caption\na,one\nb,two\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le"])
def test_tables_of_any_form(tmp_path, text, encoding):
    assert captions_of(read(plan(tmp_path, text.encode(encoding)))) == {"a": ["one"], "b": ["two"]}


@pytest.mark.parametrize("num_lines", [4, 60, 3000])
@pytest.mark.parametrize("bad", ['"caption', '"cap""tion', 'x,"y'])
def test_a_quote_that_is_never_closed_costs_its_line(tmp_path, num_lines, bad):
    names = [f"{number:04d}.jpg" for number in range(num_lines)]
    texts = [bad if number == num_lines // 2 else f"caption {number}" for number in range(num_lines)]
    text = "image,caption\n" + "".join(
        f"{name},{caption}\n" for name, caption in zip(names, texts, strict=True)
    )
    records = read(plan(tmp_path, text, files=names))
    assert len(captions_of(records)) == num_lines - 1
    [reject] = [record for record in records if isinstance(record, Reject)]
    assert f"line {num_lines // 2 + 2}: a quote is opened and not closed" in reject.message


def test_blanks_before_a_quote(tmp_path):
    text = 'image, "caption"\na.jpg, "first, one"\na.jpg, "second\nline, two"\na.jpg, third\na.jpg,he said, "hi"\n'
    text += 'b.jpg, "hi" he said\nb.jpg,"it, ""is"" , so"\n'
    assert captions_of(read(plan(tmp_path, text))) == {
        "a": ["first, one", "second\nline, two", " third", 'he said, "hi"'],
        "b": [' "hi" he said', 'it, "is" , so'],
    }


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ((["one", "two"], ["b \U0001f600"]), [["one", "two"], ["b \U0001f600"]]),
        (("['one', \"it's\"]", "['b']"), [["one", "it's"], ["b"]]),
        (("['one' 'two']", "['b']"), [["['one' 'two']"], ["['b']"]]),
        (('["one"]', "[sic] two"), [['["one"]'], ["[sic] two"]]),
        (("[1, 2]", "[3]"), [["[1, 2]"], ["[3]"]]),
    ],
)
@pytest.mark.parametrize("name", ["caption", "captions"])
def test_a_caption_is_a_list_where_all_are(tmp_path, cells, expected, name):
    cells = [cell if isinstance(cell, str) else json.dumps(cell) for cell in cells]
    text = io.StringIO()
    csv.writer(text).writerows([("image", name), *zip(["a.jpg", "b.jpg"], cells, strict=True)])
    assert list(captions_of(read(plan(tmp_path, text.getvalue()))).values()) == expected


def test_quotes_in_the_middle_of_a_field_are_text(tmp_path):
    text = 'image,caption\na.jpg,a 5" pipe\nb.jpg,"say ""hi"", he said"\n'
    assert captions_of(read(plan(tmp_path, text))) == {"a": ['a 5" pipe'], "b": ['say "hi", he said']}
    text = 'image,caption\na.jpg,"a \\"quoted\\" word"\nb.jpg,x\n'
    assert captions_of(read(plan(tmp_path, text))) == {"a": ['a "quoted" word'], "b": ["x"]}


def test_a_backslash_escapes_a_quote_and_nothing_else(tmp_path):
    lines = [
        *("image,caption", 'a.jpg,"he said \\"hi\\", ok"', "a.jpg,AC\\DC on stage", "a.jpg,back\\\\slash"),
        *("b.jpg,c:\\new\\dir", 'b.jpg,"dir C:\\"', 'b.jpg,"a \\"c\\\\"', "b.jpg,end"),
    ]
    assert captions_of(read(plan(tmp_path, "\n".join(lines)))) == {
        "a": ['he said "hi", ok', "AC\\DC on stage", "back\\\\slash"],
        "b": ["c:\\new\\dir", "dir C:\\", 'a "c\\', "end"],
    }


def test_a_quote_is_escaped_for_the_first_time_late_in_a_file(tmp_path):
    text = "image,caption\n" + "a.jpg,plain\n" * 500 + 'b.jpg,"he said \\"hi\\", ok"\n'
    assert captions_of(read(plan(tmp_path, text)))["b"] == ['he said "hi", ok']


def test_backslashes_part_folders(tmp_path):
    text = 'image,caption\nimg\\a.jpg,"\\"hi\\", ok"\nimg\\b.jpg,two\n'
    (tmp_path / "images/img").mkdir(parents=True)
    assert captions_of(read(plan(tmp_path, text, files=["img/a.jpg", "img/b.jpg"]))) == {
        "a": ['"hi", ok'],
        "b": ["two"],
    }


@pytest.mark.parametrize(
    ("encoding", "caption"),
    [
        ("cp1252", "un café à la crème"),
        ("gb18030", "一只狗在草地上奔跑，两个人骑自行车"),
        ("shift_jis", "犬が芝生の上を走っている"),
        ("cp1251", "Собака бежит по траве"),
        ("euc_kr", "개가 잔디밭을 달리고 있다"),
    ],
)
def test_text_in_another_encoding_is_read_as_what_it_is_and_counted(tmp_path, encoding, caption):
    names = [f"{number}.jpg" for number in range(20)]
    text = "image,caption\n" + "".join(f"{name},{caption} {name[0]}\n" for name in names)
    shards = plan(tmp_path, text.encode(encoding), files=names)
    assert captions_of(read(shards))["3"] == [f"{caption} 3"]
    assert plan_counters(shards)["captions_not_utf8"] == 20


def test_a_line_that_is_not_utf8_does_not_change_the_others(tmp_path):
    lines = [b"image,caption", "a.jpg,一只狗 é".encode(), "b.jpg,café".encode(), b"c.jpg,caf\xe9"]
    shards = plan(tmp_path, b"\n".join(lines), files=["a.jpg", "b.jpg", "c.jpg"])
    assert captions_of(read(shards)) == {"a": ["一只狗 é"], "b": ["café"], "c": ["café"]}
    assert plan_counters(shards)["captions_not_utf8"] == 1


class TestColumns:
    TEXT = "image,caption,long,uid,licence\na.jpg,one,long one,u1,free\na.jpg,uno,long uno,u1,free\nb.jpg,two,l2,u2,\n"

    def plan(self, tmp_path, metadata=(), **columns):
        shards = plan(tmp_path, self.TEXT)  # writes the files
        source = Flickr30kSource(
            (f"{tmp_path}/results.token",),
            str(tmp_path),
            metadata_columns=metadata,
            columns=ColumnNames(**columns),
        )
        assert shards
        return source.shards(f"{tmp_path}/other", 10)

    def test_named(self, tmp_path):
        records = read(self.plan(tmp_path, ("licence", "long"), caption="long", key="uid", image="image"))
        assert captions_of(records) == {"u1": ["long one", "long uno"], "u2": ["l2"]}
        assert records[0].metadata == {"licence": "free", "long": "long one"}

    def test_a_key_that_is_empty_is_made_of_the_name(self, tmp_path):
        self.TEXT = "image,caption,uid\na.jpg,one,\nb.jpg,two,k\n"
        assert captions_of(read(self.plan(tmp_path, key="uid"))) == {"a": ["one"], "k": ["two"]}

    @pytest.mark.parametrize("columns", [{"image": "zzz"}, {"caption": "zzz"}, {"key": "zzz"}])
    def test_that_are_not_there_are_refused_with_those_that_are(self, tmp_path, columns):
        with pytest.raises(OptionError, match=r"has no column 'zzz'; it has 'image', 'caption', 'long'"):
            self.plan(tmp_path, **columns)
        with pytest.raises(OptionError, match="no column 'nope'"):
            self.plan(tmp_path, ("nope",))

    @pytest.mark.parametrize(
        ("header", "note"),
        [
            ("image,caption,caption", "each of the columns 'caption', 'caption' holds a caption."),
            ("image,caption,Caption", "'Caption' holds a caption. --caption_column names one of them."),
            ("image,caption,caption.1", "'caption.1' holds a caption. --caption_column names one of them."),
        ],
    )
    def test_columns_of_one_name_are_several_captions(self, tmp_path, header, note):
        shards = plan(tmp_path, f"{header}\na.jpg,one,two\na.jpg,three,\nb.jpg,four,five\n")
        assert captions_of(read(shards)) == {"a": ["one", "two", "three"], "b": ["four", "five"]}
        [told] = Flickr30kSource((f"{tmp_path}/results.token",), str(tmp_path)).column_notes()
        assert note in told

    @pytest.mark.parametrize(
        ("header", "note"),
        [
            ("image,caption,text", "the captions are those of column 'caption', not of 'text'."),
            ("image,image,caption", "2 columns are named 'image'. The first is read."),
            ("image,caption,licence", None),
            ("image,caption,number", None),
        ],
    )
    def test_columns_that_are_not_read_are_told(self, tmp_path, header, note):
        (tmp_path / "c.csv").write_text(f"{header}\na.jpg,b.jpg,one\na.jpg,b.jpg,two\n")
        notes = Flickr30kSource((f"{tmp_path}/c.csv",), str(tmp_path)).column_notes()
        assert len(notes) == (note is not None)
        assert note is None or note in notes[0]

    def test_several_that_may_be_meant_are_asked_for(self, tmp_path):
        with pytest.raises(OptionError, match=r"several columns that may be the captions.*--caption_column"):
            plan(tmp_path, "pic,one,two\na.jpg,x,y\nb.jpg,z,w\n")

    def test_a_file_of_tokens_has_none(self, tmp_path):
        self.TEXT = "a.jpg#0\tone\n"
        with pytest.raises(OptionError, match="no columns to name"):
            self.plan(tmp_path, caption="x")


def mutated(lines: list[bytes], draw: random.Random) -> tuple[list[bytes], int]:
    """Returns lines of which one is changed, and which."""
    at = draw.randrange(1, len(lines))
    line = bytearray(lines[at])
    for _ in range(draw.randrange(1, 4)):
        place = draw.randrange(len(line) + 1)
        kind = draw.randrange(3)
        if kind == 0:
            line.insert(place, draw.choice(b'",;|\\\t\0#\x80\xff\r ab'))
        elif kind == 1 and line:
            del line[min(place, len(line) - 1)]
        elif line:
            line[min(place, len(line) - 1)] = draw.randrange(256)
    return [*lines[:at], bytes(line).replace(b"\n", b" "), *lines[at + 1 :]], at


def check_mutations(number: int, seed: int) -> None:
    """Checks that a line that is changed costs no other: each of them is there, whatever becomes of it."""
    draw = random.Random(seed)
    shapes = [
        [b"image,caption", *(b'%03d.jpg,"caption, %d"' % (n, n) for n in range(12))],
        [b"%03d.jpg#0\tcaption, %d" % (n, n) for n in range(12)],
        [b"image_name| comment_number| comment", *(b"%03d.jpg| 0| caption, %d" % (n, n) for n in range(12))],
        [b"id;file;text", *(b"%d;%03d.jpg;caption, %d" % (n, n, n) for n in range(12))],
        [b"image~caption", *(b"%03d.jpg~caption, %d" % (n, n) for n in range(12))],
        [b"image,caption", *(b'%03d.jpg, "caption, %d"' % (n, n) for n in range(12))],
    ]
    for _ in range(number):
        lines = draw.choice(shapes)
        has_header = b".jpg" not in lines[0]
        changed, at = mutated(lines, draw)
        source = Flickr30kSource(("x",), ".")
        parts = list(source.parts("x", io.BytesIO(b"\n".join(changed) + b"\n")))
        captions = {(part.ref, part.text.strip()) for part in parts if isinstance(part, Caption)}
        for n in range(12):
            if n + has_header != at:
                assert (f"{n:03d}.jpg", f"caption, {n}") in captions, (changed[at], parts)
        assert len(parts) >= 11


def test_a_line_that_is_changed_costs_no_other():
    check_mutations(1500, 1)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_line_that_is_changed_costs_no_other_long():
    check_mutations(100_000, 2)


@pytest.mark.parametrize(
    ("top", "separator"), [("C:\\\\data", "\\"), ("/data", "/"), ("/", "/"), ("/a/b c", "/"), ("", "/")]
)
def test_keys_of_absolute_paths_say_nothing_of_the_machine(tmp_path, top, separator):
    names = [["cat", "1.jpg"], ["dog", "1.jpg"], ["dog", "2.jpg"]]
    lines = "".join(f"{separator.join([top, *name])},{name[0]}\n" for name in names)
    write_dataset(tmp_path, "image,caption\n" + lines, ["/".join(name) for name in names])
    source = open_source([str(tmp_path)], "auto", SourceOptions())
    records = [record for shard in source.shards(f"{tmp_path}-plans", 10) for record in shard.rows()]
    assert [record.key for record in records] == ["cat/1", "dog/1", "2"]


def test_one_file_named_from_two_folders_is_one_row(tmp_path):
    write_dataset(tmp_path, "image,caption\n1.jpg,a\nimages/1.jpg,b\nother/1.jpg,c\n", ["1.jpg"])
    source = open_source([str(tmp_path)], "auto", SourceOptions())
    [row, lost] = [record for shard in source.shards(f"{tmp_path}-plans", 10) for record in shard.rows()]
    assert (row.captions, lost.reason) == (["a", "b"], "missing_image")


def write_dataset(folder, text, images):
    (folder / "captions.csv").write_text(text)
    for image in images:
        path = folder / "images" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"an image")
