import json
import os
import sys
import threading
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reap.errors import ReapError
from reap.text import localfiles, sources
from reap.text.batching import batches, parse_spec

END = 256


def make_tokenizer(cls=PreTrainedTokenizerFast, **options):
    """One token per byte, then <end> and <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<pad>"])
    return cls(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        **options,
    )


TOKENIZER = make_tokenizer()
CHAT = make_tokenizer(
    chat_template="{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
)


def text_of(batch):
    return [
        TOKENIZER.decode(ids[mask.bool()])
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


def all_text(*args, **options):
    return [row for batch in batches(*args, **options) for row in text_of(batch)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "spec, kind, domain, weight",
    [
        ("stdlib:code", "stdlib", "code", 1),
        ("stdlib:prose/heldout=0.5", "stdlib", "prose", 0.5),
        ("notes.txt=3", "files", "notes", 3),
        ("src", "files", "src", 1),
        ("src/**/*.py=2e1", "files", "src", 20),
        ("src/*/deep/*.py", "files", "src", 1),
        ("a=1", "files", "a=1", 1),  # a file of that very name
        ("hf:org/some.set:train:body", "hub", "some.set", 1),
        ("org/name=2", "hub", "name", 2),
        ("hf:org/name/config:test=2", "hub", "name", 2),
        ("day=1/*.jsonl", "files", "day=1", 1),  # a share holds no slash
        ("notes.txt:body=3", "files", "notes", 3),
        ("src/*.jsonl:body", "files", "src", 1),
    ],
)
def test_spec(here, spec, kind, domain, weight):
    (here / "src").mkdir()
    (here / "notes.txt").write_text("x")
    (here / "a=1").write_text("x")
    source = parse_spec(spec)
    assert (source.kind, source.domain, source.weight) == (kind, domain, weight)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("missing.txt", "no such file"),
        ("missing.jsonl:body", "no such file"),
        ("data/missing.jsonl", "no such file"),
        ("../up/name", "no such file"),
        ("org/name/config", "no such file"),  # rather a folder's name that is mistyped
        ("day=1/missing.jsonl", "no such file"),
        ("stdlib:poetry", "stdlib:code"),
        ("stdlib:code/train", "/heldout"),
        ("stdlib:code=0", "weight '0'"),
        ("stdlib:code=-1", "weight '-1'"),
        ("stdlib:code=nan", "weight 'nan'"),
        ("stdlib:code=much", "weight 'much'"),
        ("=2", "names nothing"),
        ("", "names nothing"),
    ],
)
def test_bad_spec(here, spec, message):
    with pytest.raises(ReapError) as error:
        batches([spec], TOKENIZER)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.ndjson", "a.json"])
def test_lines_of_json_are_known_by_suffix(here, name):
    (here / name).write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert all_text([name], TOKENIZER, packing=False) == ["one", "two"]


def test_the_same_text_twice_is_refused(here, monkeypatch):
    """Under another name, in an overlapping folder, or as a copy; a column of its own is not."""
    (here / "src").mkdir()
    for name in ("a.jsonl", "copy.jsonl", "src/b.txt"):
        (here / name).write_text('{"text": "one", "more": "two"}')
    (here / "src/b.txt").write_text("other text")
    os.symlink("a.jsonl", "link.jsonl")
    for one, two in [
        ("a.jsonl", "./a.jsonl=2"),
        ("a.jsonl", "link.jsonl"),
        ("a.jsonl", "copy.jsonl"),
        ("src", "src/b.txt"),
        ("src", "src/*.txt"),
        ("stdlib:code", "stdlib:code=2"),
    ]:
        with pytest.raises(ReapError) as error:
            batches([one, two], TOKENIZER)
        assert repr(one) in str(error.value) and repr(two) in str(error.value)
    both = ["a.jsonl:text", "link.jsonl:more", "src", "stdlib:code", "stdlib:code/heldout"]
    assert batches(both, TOKENIZER)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    with pytest.raises(ReapError, match="'org/name' and 'hf:org/name:train' both hold org/name"):
        batches(["org/name", "hf:org/name:train"], TOKENIZER)


def test_what_is_not_used_once_is_counted(here):
    """Rows that are empty, bad or repeated, also across sources and in files as a whole."""
    rows = ['{"text": "one"}', '{"text": ""}', '{"text": "one"}', '{"txt": "?"}', '{"text"', ""]
    (here / "a.jsonl").write_text("\n".join(rows))
    (here / "src").mkdir()
    for name, content in {"a": b"two", "b": b"two", "c": b"", "d": b"\0", "e": b"one"}.items():
        (here / f"src/{name}.txt").write_bytes(content)
    with pytest.raises(ReapError, match="line 4"):
        list(batches("a.jsonl", TOKENIZER))
    read = batches(["a.jsonl", "src"], TOKENIZER, packing=False, skip_bad=True)
    assert sorted(row for batch in read for row in text_of(batch)) == ["one"] * 3 + ["two"] * 2
    counts = [
        {name: source[name] for name in ("rows", "empty", "bad", "repeated")}
        for source in read.describe()["sources"]
    ]
    assert counts[0] == {"rows": 2, "empty": 1, "bad": 2, "repeated": 1}
    # Whether the file or the line came first, one of the two repeats the other.
    assert counts[1] == {"rows": 3, "empty": 1, "bad": 1, "repeated": 2}
    line, files = read.notes()
    assert "a.jsonl: 2 rows left out as bad (a.jsonl, line 4: " in line and "line 5" in line
    assert "1 row left out as empty; 1 row used that came before" in line
    assert "src/d.txt: holds a zero byte" in files


def test_text_of_special_tokens_alone(here):
    (here / "a.txt").write_text("<end>" * 9 + "<pad>")
    (here / "b.txt").write_text("<end>" * 9 + "x")
    with pytest.raises(ReapError, match="a.txt' holds no text: its first 11 tokens are all"):
        list(batches("a.txt", TOKENIZER))
    assert len(list(batches("b.txt", TOKENIZER, seq_len=4))) == 3
    (here / "c.txt").write_text("<end>" * 2000 + "x")
    with pytest.raises(ReapError, match="first 1,024 tokens"):
        list(batches("c.txt", TOKENIZER, seq_len=4))


def test_a_dangling_link_is_named(here):
    (here / "src").mkdir()
    os.symlink("nowhere", here / "src/a.txt")
    with pytest.raises(ReapError, match="src/a.txt: cannot be read"):
        list(batches("src", TOKENIZER))


def test_nothing_but_bad_rows_is_no_text(here):
    (here / "a.jsonl").write_text('{"txt": "?"}')
    with pytest.raises(ReapError, match="holds no text: 1 row left out as bad .a.jsonl, line 1"):
        list(batches("a.jsonl", TOKENIZER, skip_bad=True))


def test_a_cap_per_source(here):
    (here / "a.txt").write_text("a" * 300)
    (here / "b.txt").write_text("b" * 50)
    read = batches(
        ["a.txt=9", "b.txt"], TOKENIZER, seq_len=16, batch_size=3, max_tokens_per_source=90
    )
    list(read)
    assert [source["tokens"] for source in read.describe()["sources"]] == [90, 51]
    assert read.expected == 141


def test_reading_ahead_changes_nothing(here):
    """But when errors show, and how far the source is read."""
    (here / "a.jsonl").write_text("\n".join(json.dumps({"text": "x" * n}) for n in range(1, 40)))

    def read(ahead):
        rows = batches(["a.jsonl", "stdlib:code=2"], TOKENIZER, seq_len=16, max_tokens=500)
        seen: list[int] = []
        if ahead is not None:
            assert rows.read_ahead(seen.append, ahead) == (ahead > 500)
            assert rows.tokens == 0 and sum(seen) >= min(ahead, 500)
        got = [(batch.domain, batch.input_ids.tolist()) for batch in rows]
        return got, rows.describe()

    assert read(None) == read(100) == read(1000)
    with open("a.jsonl", "a") as file:
        file.write("\nbad")
    rows = batches("a.jsonl", TOKENIZER, seq_len=16)
    assert next(rows).tokens == 16
    with pytest.raises(ReapError, match="line 40"):
        rows.read_ahead()


@pytest.mark.parametrize("special", [True, False])
def test_a_tokenizer_that_makes_nothing_of_text(special):
    """Which is what transformers makes of a folder that has none."""
    empty = Tokenizer(models.BPE({}, []))
    if not special:
        empty = Tokenizer(models.WordLevel({"<end>": 0, "<unk>": 1}, unk_token="<unk>"))
    hollow = PreTrainedTokenizerFast(tokenizer_object=empty, eos_token="<end>", unk_token="<unk>")
    with pytest.raises(ReapError, match="makes no tokens of ordinary text"):
        batches("stdlib:code", hollow)


def test_expected_tokens(here):
    """The time left of a calibration on all of the text: from the share of it that was read."""
    (here / "a.txt").write_text("0123456789" * 300)  # one piece: rows lie within it
    lines = [json.dumps({"text": "x" * 100})] * 50
    (here / "b.jsonl").write_text("\n".join(lines))
    (here / "src").mkdir()
    for number in range(20):
        (here / f"src/{number}.py").write_text("y" * 149)
    for packing in (True, False):
        rows = batches(["a.txt", "b.jsonl", "src"], TOKENIZER, seq_len=100, packing=packing)
        whole = 3001 + 5050 + 3000 if packing else 100 + 5000 + 2000
        assert rows.expected is None
        seen = [rows.expected for _ in rows]
        assert None in seen and seen[-1] == rows.tokens == whole
        assert all(abs(total - whole) < 0.1 * whole for total in seen if total)
    rows = batches("a.txt", TOKENIZER, seq_len=100, max_tokens=700)
    assert rows.expected == 700 and [rows.expected for _ in rows] == [700] * 7
    rows = batches("a.txt", TOKENIZER, seq_len=100, max_tokens=7000)  # more than there is
    assert [rows.expected for _ in rows][-1] == 3001


def test_the_library_s_share_is_that_of_its_files():
    stream = sources.read(parse_spec("stdlib:prose/heldout"), TOKENIZER, 0)
    shares = [next(stream).share for _ in range(5)]
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1] < 0.5


def test_chat_messages_go_through_the_template(here):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (here / "c.jsonl").write_text(json.dumps({"messages": turns}))
    assert all_text(["c.jsonl"], CHAT, seq_len=99) == ["[user]hi[assistant]yo<end>"]
    with pytest.raises(ReapError, match="c.jsonl, line 1: .*no chat template"):
        list(batches(["c.jsonl"], TOKENIZER))


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a"', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"txt": "a"}', '"text", a string'),
        (b'{"text": 5}', '"text", a string'),
        (b'{"messages": []}', '"text", a string'),
        (b"7", '"text", a string'),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"messages": ["not a turn"]}', "chat template refuses"),
    ],
)
def test_bad_line_is_named(here, line, message):
    template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    (here / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(ReapError) as error:
        list(batches(["a.jsonl"], make_tokenizer(chat_template=template)))
    assert "a.jsonl, line 3" in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [(b"", "holds no text"), (b"ok\0", "zero byte"), (b"caf\xe9 au lait", "byte 0xe9")],
)
def test_bad_text_file_is_named(here, content, message):
    (here / "a.txt").write_bytes(content)
    with pytest.raises(ReapError, match=f"a.txt.*{message}"):
        list(batches(["a.txt"], TOKENIZER))


def test_pipe(here):
    os.mkfifo("pipe")
    os.symlink("pipe", "input.link")
    assert parse_spec("input.link").domain == "input"
    writer = threading.Thread(target=(here / "pipe").write_text, args=("through a pipe",))
    writer.start()
    assert all_text(["pipe"], TOKENIZER, packing=False) == ["through a pipe"]
    writer.join()


def test_unreadable_folder_is_named(here, monkeypatch):
    (here / "src/closed").mkdir(parents=True)
    (here / "src/a.py").write_text("a")
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ReapError, match="src/closed: cannot be read"):
        batches(["src"], TOKENIZER)


def test_folder_and_glob(here):
    for name in ("src/a.py", "src/deep/b.py", "src/c.bin", "src/.git/d.py", "src/e.txt"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    (here / "src/empty.py").write_text("")
    folder = all_text(["src"], TOKENIZER, packing=False)
    assert sorted(folder) == ["src/a.py", "src/deep/b.py", "src/e.txt"]
    assert sorted(all_text(["src/**/*.py"], TOKENIZER, packing=False)) == sorted(folder)[:2]
    orders = {tuple(all_text(["src"], TOKENIZER, packing=False, seed=s)) for s in range(20)}
    assert len(orders) > 1
    for empty in ("src/*.rs", "src/.git"):
        (here / "src/.git/d.py").unlink(missing_ok=True)
        with pytest.raises(ReapError, match="no text files"):
            list(batches([empty], TOKENIZER))


def test_large_file_is_read_in_blocks_and_only_as_far_as_needed(here, monkeypatch):
    monkeypatch.setattr(localfiles, "_BLOCK", 1000)
    line = "0123456789" * 7 + "\n"
    (here / "big.txt").write_text(line * 400 + "\0")  # the zero byte is in the last block
    some = batches(["big.txt"], TOKENIZER, seq_len=71, max_tokens=7100)
    assert [text_of(batch) for batch in some] == [[line]] * 100
    with pytest.raises(ReapError, match="zero byte"):
        list(batches(["big.txt"], TOKENIZER, seq_len=71))
    for text in (line * 400, "0123456789" * 500):  # the second has no line ends to cut at
        (here / "big.txt").write_text(text)
        assert "".join(all_text(["big.txt"], TOKENIZER, seq_len=64)) == text + "<end>"
        assert all_text(["big.txt"], TOKENIZER, seq_len=64, packing=False) == [text[:64]]


def test_mix_keeps_its_shares_and_never_a_batch_of_two_domains(here):
    (here / "a.txt").write_text("a" * 3000)
    (here / "b.txt").write_text("b" * 900)
    mixed = batches(["a.txt=3", "b.txt"], TOKENIZER, seq_len=8, batch_size=2, max_tokens=1601)
    tokens = {"a": 0, "b": 0}
    for batch in mixed:
        assert set("".join(text_of(batch))) == {batch.domain}
        tokens[batch.domain] += batch.tokens
        assert abs(tokens["a"] - 3 * tokens["b"]) <= 3 * 16
    assert sum(tokens.values()) == mixed.tokens == 1601
    everything = batches(["a.txt=3", "b.txt"], TOKENIZER, seq_len=8)
    list(everything)  # what runs out leaves its share to the other
    assert [s["tokens"] for s in everything.describe()["sources"]] == [3001, 901]


def test_domain_override(here):
    (here / "a.txt").write_text("abc")
    assert [b.domain for b in batches(["a.txt"], TOKENIZER, domain="mine")] == ["mine"]


def test_a_domain_has_a_name(here):
    (here / "a.txt").write_text("abc")
    with pytest.raises(ReapError, match="data 'a.txt': its domain is empty"):
        batches(["a.txt"], TOKENIZER, domain="")


def test_record_names_exactly_the_tokens_used(here):
    (here / "a.txt").write_text("abcdefgh" * 50)

    def sha(**options):
        read = batches(["a.txt"], TOKENIZER, **{"seq_len": 16, "max_tokens": 100} | options)
        assert sum(batch.tokens for batch in read) == read.describe()["tokens"]
        assert json.loads(json.dumps(read.describe())) == read.describe()
        return read.describe()["sources"][0]["sha256"]

    reference = sha()
    assert sha(batch_size=4) == reference
    assert reference not in (sha(max_tokens=99), sha(seq_len=17))
    (here / "a.txt").write_text("abcdefgh" * 10 + "x" + "abcdefgh" * 40)
    assert sha() != reference


@pytest.mark.parametrize("option", ["seq_len", "batch_size", "max_tokens"])
@pytest.mark.parametrize("value", [0, 2e6])
def test_bad_options(option, value):
    with pytest.raises(ReapError, match=f"{option} is {value}: .* whole number"):
        batches(["stdlib:code"], TOKENIZER, **{option: value})


def test_no_data():
    with pytest.raises(ReapError, match="no data"):
        batches([], TOKENIZER)


def test_hub_needs_datasets_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ReapError, match="pip install datasets"):
        batches(["hf:org/name"], TOKENIZER)


def test_hub_data_set(monkeypatch):
    class DataSet(list):
        def shuffle(self, seed, buffer_size):
            return reversed(self)

    def load_dataset(name, config=None, *, split, streaming):
        assert streaming
        if config:
            return DataSet([{"text": f"{name}, {config}, {split}"}])
        if name == "org/down":
            raise ConnectionError("no route\nto host")
        return DataSet([{"body": f"{name}/{split}"}, {"body": "last"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    rows = all_text(["hf:org/name:test:body"], TOKENIZER, packing=False)
    assert rows == ["last", "org/name/test"]
    rows = all_text(["hf:org/name/config"], TOKENIZER, packing=False)
    assert rows == ["org/name, config, train"]
    with pytest.raises(ReapError, match='name, sample 1: needs "text"'):
        list(batches(["org/name"], TOKENIZER))
    with pytest.raises(ReapError, match="ConnectionError: no route$"):
        list(batches(["org/down"], TOKENIZER))


def test_the_same_arguments_give_the_same_batches():
    def read(seed):
        rows = batches(
            ["stdlib:code=2", "stdlib:prose"],
            TOKENIZER,
            seq_len=64,
            batch_size=4,
            max_tokens=4000,
            seed=seed,
        )
        return [(batch.domain, batch.input_ids.tolist()) for batch in rows], rows.describe()

    assert read(3) == read(3) and read(3) != read(4)
    assert "python" in read(3)[1]["sources"][0]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("options", [{}, {"max_tokens": 700}, {"max_tokens_per_source": 150}])
@pytest.mark.parametrize("of", [2, 3, 20])
def test_shards_are_the_run_in_one(here, of, options, packing):
    """Each batch comes from one of them, limits are of all together, and all tell of one run."""
    for name in "ab":
        rows = ({"text": f"{name} number {i}" * (1 + i % 3)} for i in range(40))
        (here / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = options | {"seq_len": 16, "batch_size": 2, "packing": packing}
    specs = ["a.jsonl=2", "b.jsonl"]
    whole = batches(specs, TOKENIZER, **options)
    want = [(batch.domain, text_of(batch)) for batch in whole]
    found = {}
    for number in range(of):
        some = batches(specs, TOKENIZER, **options, shard=f"{number}/{of}")
        if number % 2:
            assert some.read_ahead()
            held = batches(specs, TOKENIZER, **options)
            held.read_ahead()
            assert some.beginning() == held.beginning()
        for batch in some:
            found[some.position - 1] = batch.domain, text_of(batch)
        assert some.position == whole.position == len(want)
        shard = {"numbers": [number], "of": of}
        assert some.describe() == whole.describe() | {"shard": shard}
        assert abs(some.expected_here - whole.tokens / of) <= 0.1 * whole.tokens / of + 1
    assert [found[position] for position in range(len(want))] == want


def test_the_beginning_is_that_of_the_text(here):
    (here / "a.txt").write_text("some text " * 50)
    beginnings = set()
    for text in ("some text ", "some more "):
        (here / "a.txt").write_text(text * 50)
        for limit in (1, 100):
            found = batches("a.txt", TOKENIZER, seq_len=16)
            found.read_ahead(limit=limit)
            beginnings.add(found.beginning())
    assert len(beginnings) == 4
