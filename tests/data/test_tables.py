"""Instructions in CSV and TSV, and files whose fields have other names."""

import csv
import json

import pytest

from k2mini.data.instructions import read_records

RECORDS = [
    {"instruction": "What is granite?", "input": "", "output": "A rock."},
    {"instruction": 'Say "quartz", twice', "input": "two\nlines, and a comma", "output": "quartz,\tquartz"},
    {"instruction": "  spaces", "input": "é 岩", "output": "x" * 200_000},
]


def write(path, records, columns=("instruction", "input", "output"), names=None, **form):
    with path.open("w", newline="", encoding=form.pop("encoding", "utf-8")) as file:
        rows = csv.writer(file, quoting=csv.QUOTE_ALL, **form)
        rows.writerow([(names or {}).get(column, column) for column in columns])
        rows.writerows([record[column] for column in columns] for record in records)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.csv", {}),
        ("A.CSV", {"encoding": "utf-8-sig", "lineterminator": "\n"}),
        ("a.tsv", {"delimiter": "\t"}),
    ],
)
def test_a_table_is_read_as_json_is(tmp_path, name, form):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    expected = [messages for _, messages in read_records(tmp_path / "a.json")]
    write(tmp_path / name, RECORDS, ("output", "instruction", "input"), **form)
    found = read_records(tmp_path / name)
    assert [messages for _, messages in found] == expected
    # The third record begins after one with a line break in it.
    assert [place for place, _ in found] == [f"{tmp_path / name}, line {n}" for n in (2, 3, 5)]


def test_leading_spaces_stay(tmp_path):
    """Which csv.writer does not quote."""
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("instruction", "output"), ("indent", "    return x")])
    assert read_records(tmp_path / "a.csv")[0][1][1]["content"] == "    return x"


def test_conversations_keep_their_own_names(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": turns, "title": "c", "meta": "d"}]))
    fields = {"instruction": "title", "output": "meta"}
    assert read_records(tmp_path / "a.json", fields=fields)[0][1] == turns
    with pytest.raises(ValueError, match=r"data\.fields names a field of the files twice"):
        read_records(tmp_path / "a.json", fields={"instruction": "title", "output": "title"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must have a header of columns, each once, and rows below"),
        ("instruction,output\n\n", r"and rows below; its columns are \['instruction', 'output'\]"),
        ("instruction,output\n", r"and rows below; its columns are \['instruction', 'output'\]"),
        ("instruction,instruction\na,b\n", "each once"),
        ("instruction,output\na,b\nc\n", r"a.csv, line 3 has 1 cells, the header has 2: \['instruction', 'output'\]"),
        ("instruction,output\na,b,c\n", "a.csv, line 2 has 3 cells, the header has 2"),
        ('instruction,output\na,b\n"c\nd,e', "a.csv, line 3 is not valid CSV: unexpected end of data"),
        ('instruction,output\n"a"b,c', "a.csv, line 2 is not valid CSV"),
        ("instruction,output\na,\xff\n", r"a.csv is not UTF-8 \(byte 21\)"),
        ("instruction,output\na,\n", "a.csv, line 2: `output` is empty, so there is nothing to learn"),
        ("instruction;output\na;b\n", r"line 2 has no `instruction`; it has \['instruction;output'\], and data.fields"),
        ("question,answer\na,b\n", r"has no `instruction`; it has \['question', 'answer'\], and data.fields can name"),
    ],
)
def test_tables_that_are_none(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "a.csv")


def test_a_missing_table(tmp_path):
    with pytest.raises(ValueError, match=r"there is no data file .*none\.csv"):
        read_records(tmp_path / "none.csv")


def test_bad_rows_can_be_left_out(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output,\na,b,\n\nc,d\ne,f,3\n")
    told = []
    found = read_records(tmp_path / "a.csv", told.append)
    assert [messages[0]["content"] for _, messages in found] == ["a", "e"]
    assert len(told) == 1
    assert "line 4 has 2 cells, the header has 3" in told[0]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_fields_have_other_names(tmp_path, suffix):
    """Swapped ones, too; a name that is taken by another field is no longer its own."""
    path = tmp_path / f"a.{suffix}"

    def read(fields, names):
        renamed = [{names.get(key, key): value for key, value in record.items()} for record in RECORDS]
        if suffix == "csv":
            write(path, RECORDS, names=names)
        else:
            lines = [json.dumps(record) for record in renamed]
            path.write_text("\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]")
        return [messages for _, messages in read_records(path, fields=fields)]

    expected = read(None, {})
    names = {"instruction": "question", "input": "context", "output": "answer"}
    assert read(names, names) == expected
    assert read({"output": "answer"}, {"output": "answer"}) == expected
    swapped = {"instruction": "output", "output": "instruction"}
    assert read(swapped, swapped) == expected
    # `input` holds the instruction here, so it is not the text that the instruction is about.
    without = read({"instruction": "input"}, {"instruction": "input", "input": "other"})
    assert without == [[{**messages[0], "input": ""}, messages[1]] for messages in expected]


def test_unknown_fields_are_refused(tmp_path):
    lines = [{"question": "a", "answer": "b"}, {"question": "a"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"a.jsonl has no 'asked', which data.fields.instruction names; it has "
                       "'question', 'answer'"):  # fmt: skip
        read_records(path, fields={"instruction": "asked", "output": "answer"})
    told = []
    assert len(read_records(path, told.append, fields={"instruction": "question", "output": "answer"})) == 1
    assert told == [f"{path}, line 2 has no `answer`"]


def test_the_first_records_alone(tmp_path, caplog):
    caplog.set_level("INFO", logger="k2mini")
    write(tmp_path / "a.csv", RECORDS)
    whole = read_records(tmp_path / "a.csv")
    assert read_records(tmp_path / "a.csv", limit=2) == whole[:2]
    assert "a.csv: the first 2 of 3 records (data.limit)" in caplog.text
    assert read_records(tmp_path / "a.csv", limit=9) == whole
