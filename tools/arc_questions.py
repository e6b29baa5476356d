"""ARC (Clark et al. 2018, arXiv 1803.05457) as questions for `k2mini eval`, from K2's instruction data arc_sft.json.

`python tools/arc_questions.py arc_sft.json ARC.jsonl --limit 1000`

The file holds ARC's questions of all parts, Easy and Challenge: a record's instruction is the question, its input the
options, a line each, its output the label of the right one.
"""

import argparse
import json
import re
from pathlib import Path

OPTION = re.compile(r"^([A-Z1-9])\. (.*)$", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, help="the first so many records")
    options = parser.parse_args()
    lines, left_out = [], 0
    for record in json.loads(options.records.read_text(encoding="utf-8"))[: options.limit]:
        found, key = OPTION.findall(record["input"]), record["output"].strip()
        labels, texts = [label for label, _ in found], [text for _, text in found]
        stem = record["instruction"].strip().removesuffix("Choose from:").strip()
        if stem and len(texts) > 1 and labels.count(key) == 1:
            answer = chr(ord("A") + labels.index(key))
            lines.append(json.dumps({"question": stem, "choices": texts, "answer": answer}, ensure_ascii=False) + "\n")
        else:
            left_out += 1
    options.out.write_text("".join(lines), encoding="utf-8")
    print(f"{options.out}: {len(lines):,} questions; {left_out:,} records have another form")


if __name__ == "__main__":
    main()
