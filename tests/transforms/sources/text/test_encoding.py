import io

import pytest

from diptych.transforms.sources.text import encoding
from diptych.transforms.sources.text.encoding import decode, find_encoding, lines

CAPTIONS = [
    ("cp1252", ["un café à la crème", "Un chien court dans l’herbe près de la forêt", "Une fille à vélo"]),
    ("cp1252", ["La città è bella", "Un caffè più", "Una ragazza che corre perché è felice"]),
    ("cp1252", ["Um cão corre na relva", "Duas crianças estão a brincar no chão", "Avião no céu"]),
    ("cp1252", ["En pige på en hest", "To mænd står på græsset", "Børn på gaden"]),
    ("cp1252", ["he said “yes”", "it’s a dog", "10° cold – naïve"]),
    (
        "cp1250",
        ["Pies biegnie po zielonej łące, żółty", "Dwóch mężczyzn w kapeluszach", "Kot śpi na dywanie"],
    ),
    ("iso8859_2", ["Pies biegnie po zielonej łące, żółty", "Dwóch mężczyzn w kapeluszach", "Kot śpi"]),
    ("cp1250", ["Pes běží přes zelenou louku", "Dva muži v kloboucích se dívají", "Dítě v červeném tričku"]),
    ("cp1250", ["Egy kutya fut a zöld füvön", "Két férfi kalapban", "A macska a szőnyegen alszik"]),
    (
        "cp1254",
        ["Köpek çimlerin üzerinde koşuyor", "İki adam şapkalı duruyor", "Kedi halının üstünde uyuyor"],
    ),
    ("cp1253", ["Ένας σκύλος τρέχει στο γρασίδι", "Δύο άνδρες με καπέλα", "Μια γάτα κοιμάται"]),
    ("cp1255", ["כלב רץ על הדשא", "שני גברים עם כובעים", "חתול ישן על השטיח", "ילד משחק בכדור"]),
    ("cp1256", ["كلب يركض على العشب", "رجلان يرتديان قبعات", "قطة نائمة على السجادة"]),
    ("cp1251", ["Собака Nike бежит по траве", "Двое мужчин в шляпах", "Кошка на коврике"]),
    ("koi8_r", ["Собака бежит по траве", "Двое мужчин в шляпах", "Кошка на коврике"]),
    ("cp874", ["สุนัขวิ่งบนหญ้า", "ชายสองคนสวมหมวก", "แมวนอนบนเสื่อ"]),
    ("shift_jis", ["草の上を走る犬がいます", "帽子をかぶった二人の男", "猫がTシャツの上で寝ています"]),
    ("euc_jp", ["草の上を走る犬がいます", "帽子をかぶった二人の男", "マットの上で猫が寝ている"]),
    ("cp949", ["잔디 위를 달리는 개", "모자를 쓴 두 남자", "매트 위의 고양이가 잔다"]),
    ("gb18030", ["一只狗在草地上奔跑，两个人骑 Harley 摩托车", "马场一个小女孩牵着一匹马在火堆旁边。"]),
    ("big5", ["一隻狗在草地上奔跑", "兩個戴帽子的男人站著", "貓在墊子上睡覺", "穿紅色襯衫的孩子踢球"]),
]


@pytest.mark.parametrize(("encoding", "captions"), CAPTIONS)
@pytest.mark.parametrize("num_lines", [5, 20, 200])
@pytest.mark.parametrize("form", ["{number}.jpg,{text}", "{number}_4a1b.jpg#0\t{text}", "{text} {number}"])
def test_text_is_decoded_as_what_it_is(encoding, captions, num_lines, form):
    texts = [form.format(number=number, text=captions[number % len(captions)]) for number in range(num_lines)]
    file = io.BytesIO("\n".join(texts).encode(encoding))
    decoded = list(lines(file, find_encoding(file)))
    assert [line.text for line in decoded] == texts
    assert sum(not line.is_utf for line in decoded) == sum(not text.isascii() for text in texts)


def test_a_few_accents_in_plain_text_are_western():
    texts = [*(f"{number}.jpg,plain words" for number in range(1000)), "a.jpg,café crème"]
    file = io.BytesIO("\n".join(texts).encode("cp1252"))
    assert [line.text for line in lines(file, find_encoding(file))] == texts


@pytest.mark.parametrize(
    ("encoding", "text", "is_utf"),
    [
        ("utf-8", "une fête", True),
        ("utf-8-sig", "une fête", True),
        ("utf-16", "une fête", True),
        ("utf-16-le", "a plain text", True),
        ("utf-32", "une fête", True),
        ("cp1252", "une fête", False),
        ("cp1251", "Собака", False),
        ("shift_jis", "草の上を走る犬", False),
    ],
)
def test_single_text(encoding, text, is_utf):
    assert decode(text.encode(encoding)) == (text, is_utf)


def test_utf8_that_is_cut_off_in_a_letter_stays_utf8():
    data = "一只狗在草地上奔跑".encode()
    assert decode(data[:-1]) == ("一只狗在草地上奔\ufffd", False)
    file = io.BytesIO(b"\n".join([data, data[:-1], data]))
    assert [line.text for line in lines(file, find_encoding(file))][1] == "一只狗在草地上奔\ufffd"


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["utf-8", "utf-16", "utf-32", "cp1252"])
@pytest.mark.parametrize("length", [98, 99, 100, 101, 132, 133, 1000, 200_000])
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_that_is_too_long_costs_itself_alone(monkeypatch, newline, name, length, end):
    monkeypatch.setattr(encoding, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(encoding, "_PIECE_BYTES", 32)
    texts = ["one é", "x" * length, "three", "y" * length, "", "six"]
    data = (newline.join(texts) + end.replace("\n", newline)).encode(name)
    file = io.BytesIO(data)
    found = list(lines(file, find_encoding(file)))
    assert len(found) == len(texts)
    for text, line in zip(texts, found, strict=True):
        assert line.text == text or (line.is_cut and len(text) >= 98)
    if length == 200_000 or (
        length > 100 and newline != "\r"
    ):  # lines that end in CR are counted by the block
        assert [line.is_cut for line in found] == [False, True, False, True, False, False]
