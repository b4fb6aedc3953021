"""The story grammar: writes stories, and accepts or refuses them.

`grammar.txt` holds the words and rules and says how to read it. Choices that a story makes (who, where, how
many) are kept in variables, so a story is only accepted when every later sentence agrees with the earlier ones.
`tests/stories/grammar.rs` is the same acceptor in Rust.

    python grammar.py --seed 1 --count 3        # write stories
    python grammar.py --check stories.txt       # stories separated by a line "====": count the accepted ones
"""

import argparse
import random
import re
import sys
from pathlib import Path

sys.setrecursionlimit(20_000)

GRAMMAR_FILE = Path(__file__).with_name("grammar.txt")


class Table:
    def __init__(self, columns):
        self.columns = {name: index for index, name in enumerate(columns)}
        self.rows = []


class Variable:
    """A row of `table`; `apart` are variables with another row, `ties` pairs a column with a variable's first cell."""

    def __init__(self, table, apart, ties):
        self.table, self.apart, self.ties = table, apart, ties


# What a text is made of: ("text", str) | ("cell", variable, column, capital) | ("choice", [sequence, ...]).
# A rule's name stands for ("choice", …) of its alternatives.


class Grammar:
    def __init__(self, source):
        self.tables, self.variables, self.rules = {}, {}, {}
        raw, kind, name = {}, None, None
        for line in source.splitlines():
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            if match := re.match(r"table (\S+): (.*)$", line):
                kind, name = "table", match[1]
                self.tables[name] = Table(match[2].split())
            elif match := re.match(r"let (\w+): (\w+)(.*)$", line):
                kind = None
                apart, ties, negated = [], [], False
                for word in match[3].split():
                    if word == "not":
                        negated = True
                    elif "=" in word:
                        ties.append(tuple(word.split("=")))
                    elif negated:
                        apart.append(word)
                    else:
                        raise ValueError(f"not understood: {line}")
                self.variables[match[1]] = Variable(match[2], apart, ties)
            elif match := re.match(r"(rule|seq) (\S+)$", line):
                kind, name = match[1], match[2]
                raw[name] = (kind, [])
            elif kind == "table":
                self.tables[name].rows.append([cell.strip() for cell in line.split("|")])
            elif kind == "rule" and line.startswith("- "):
                raw[name][1].append(line[2:])
            elif kind == "seq":
                raw[name][1].append(line)
            else:
                raise ValueError(f"not understood: {line}")
        for name, (kind, lines) in raw.items():
            if kind == "seq":
                lines = [re.sub(r" ?--- ?", "\n\n", " ".join(lines))]
            self.rules[name] = [self._sequence(text.replace("\\t", "\t")) for text in lines]

    def _sequence(self, text):
        items, rest = [], text
        while rest:
            if match := re.match(r"[^{<\[]+", rest):
                items.append(("text", match[0]))
            elif match := re.match(r"\{(\w)(?:\.(\w+))?\}", rest):
                table = self.tables[self.variables[match[1]].table]
                column = match[2] or next(iter(table.columns))
                capital = column[0].isupper()
                items.append(("cell", match[1], table.columns[column.lower()], capital))
            elif match := re.match(r"<([\w-]+)>", rest):
                items.append(("rule", match[1]))
            elif match := re.match(r"\[([^]]*)\]", rest):
                items.append(("choice", [self._sequence(choice) for choice in match[1].split("|")]))
            else:
                raise ValueError(f"not understood: {rest}")
            rest = rest[match.end():]
        return items

    def _alternatives(self, item):
        return self.rules[item[1]] if item[0] == "rule" else item[1]

    def _rows(self, variable, bound):
        """The rows that `variable` may still take, given the rows `bound` so far."""
        spec = self.variables[variable]
        table = self.tables[spec.table]
        for index, row in enumerate(table.rows):
            if any(bound.get(other) == index for other in spec.apart):
                continue
            if all(
                other not in bound
                or row[table.columns[column]] == self.tables[self.variables[other].table].rows[bound[other]][0]
                for column, other in spec.ties
            ):
                yield index

    def cell(self, bound, variable, column=0):
        return self.tables[self.variables[variable].table].rows[bound[variable]][column]

    # Writing.

    def write(self, rng, rule="story"):
        """One story (text) and what it is about (variable -> row)."""
        out, bound = [], {}
        self._write(("rule", rule), rng, bound, out)
        return "".join(out), bound

    def _bind(self, variable, rng, bound):
        if variable not in bound:
            for _, other in self.variables[variable].ties:
                self._bind(other, rng, bound)
            bound[variable] = rng.choice(list(self._rows(variable, bound)))

    def _write(self, item, rng, bound, out):
        if item[0] == "text":
            out.append(item[1])
        elif item[0] == "cell":
            _, variable, column, capital = item
            self._bind(variable, rng, bound)
            out.append(_cased(self.cell(bound, variable, column), capital))
        else:
            for part in rng.choice(self._alternatives(item)):
                self._write(part, rng, bound, out)

    # Reading.

    def accept(self, text, rule="story", prefix=False):
        """None if `text` is a story (with `prefix`: can still become one); else why it is not."""
        reader = _Reader(self, text, prefix)
        if reader.read(([("rule", rule)], 0, None), 0, {}):
            return None
        return reader.reason()


class _Reader:
    def __init__(self, grammar, text, prefix):
        self.grammar, self.text, self.prefix = grammar, text, prefix
        self.furthest, self.expected = 0, []

    def _literal(self, literal, at):
        """Where reading goes on after `literal`, or None; len(text) + 1 when a prefix ends inside it."""
        if self.text.startswith(literal, at):
            return at + len(literal)
        if self.prefix and literal.startswith(self.text[at:]):
            return len(self.text) + 1
        same = 0
        while at + same < len(self.text) and literal[same] == self.text[at + same]:
            same += 1
        self._refuse(literal, at + same)
        return None

    def _refuse(self, literal, at):
        if at > self.furthest:
            self.furthest, self.expected = at, []
        if at == self.furthest and literal not in self.expected:
            self.expected.append(literal)

    def read(self, frame, at, bound):
        """Whether `frame` (items, next index, enclosing frame) can be read from `at` to the end."""
        if at > len(self.text):
            return True
        while frame is not None and frame[1] == len(frame[0]):
            frame = frame[2]
        if frame is None:
            if at == len(self.text):
                return True
            self._refuse("the end", at)
            return False
        items, index, outer = frame
        item, rest = items[index], (items, index + 1, outer)
        if item[0] == "text":
            after = self._literal(item[1], at)
            return after is not None and self.read(rest, after, bound)
        if item[0] == "cell":
            _, variable, column, capital = item
            rows = [bound[variable]] if variable in bound else self.grammar._rows(variable, bound)
            for row in rows:
                now = {**bound, variable: row}
                after = self._literal(_cased(self.grammar.cell(now, variable, column), capital), at)
                if after is not None and self.read(rest, after, now):
                    return True
            return False
        return any(self.read((choice, 0, rest), at, bound) for choice in self.grammar._alternatives(item))

    def reason(self):
        before = self.text[max(0, self.furthest - 40):self.furthest]
        found = self.text[self.furthest:self.furthest + 20] or "the end"
        expected = " | ".join(sorted(self.expected)[:4])
        return f"at character {self.furthest}, after {before!r}: expected {expected!r}, found {found!r}"


def _cased(text, capital):
    return text[0].upper() + text[1:] if capital else text


def load():
    return Grammar(GRAMMAR_FILE.read_text())


def stories(seed, count, rule="story"):
    """`count` stories; different seeds give different streams."""
    grammar, rng = load(), random.Random(seed)
    return [grammar.write(rng, rule)[0] for _ in range(count)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--rule", default="story", help="story, chat, or any rule of grammar.txt")
    parser.add_argument("--check", type=Path, help="a file of stories separated by lines '===='")
    args = parser.parse_args()
    if args.check is None:
        print("\n====\n".join(stories(args.seed, args.count, args.rule)))
        return
    grammar = load()
    texts = args.check.read_text().split("\n====\n")
    reasons = [grammar.accept(text.strip(), args.rule) for text in texts]
    for number, reason in enumerate(reasons):
        if reason:
            print(f"story {number}: {reason}")
    print(f"{reasons.count(None)} of {len(reasons)} accepted")


if __name__ == "__main__":
    main()
