//! The story grammar's acceptor: tells whether a text is a story that `tools/stories/grammar.txt` can write.
//!
//! The words and rules are that file's; its head says how it is read. A story keeps its choices (who, where, how
//! many) in variables, each bound to a table's row where it is first named, so a text is a story only when all of
//! its sentences agree. Reading is a search with backtracking over the rules, one frame per open rule.
//!
//! Used by other tests as `#[path = "stories/grammar.rs"] mod grammar;`.
#![allow(dead_code)] // each test binary uses its part

use std::collections::HashMap;
use std::sync::LazyLock;

const SOURCE: &str = include_str!("../../tools/stories/grammar.txt");

static GRAMMAR: LazyLock<Grammar> = LazyLock::new(|| Grammar::parse(SOURCE));

/// Whether `story` is a whole story; if not, where it stops being one, what could stand there and what does.
/// Space around the story is ignored, special tokens are not.
pub(crate) fn accept(story: &str) -> Result<(), String> {
    read("story", story.trim(), false)
}

/// Whether some story begins with `text`: for a continuation that was cut after a number of tokens. Its beginning
/// must be the story's, its end may be inside a word.
pub(crate) fn accept_prefix(text: &str) -> Result<(), String> {
    read("story", text.trim_start(), true)
}

/// Whether `story` is a story that answers the user's `request` ("Tell me a story about Mia and a lost kite.").
pub(crate) fn accept_chat(request: &str, story: &str) -> Result<(), String> {
    let both = format!("{}\t{}", request.trim(), story.trim());
    read("chat", &both, false)
}

/// As [`accept_chat`], for a story that was cut.
pub(crate) fn accept_chat_prefix(request: &str, story: &str) -> Result<(), String> {
    let both = format!("{}\t{}", request.trim(), story.trim_start());
    read("chat", &both, true)
}

fn read(rule: &str, text: &str, prefix: bool) -> Result<(), String> {
    let grammar = &*GRAMMAR;
    let mut reader = Reader {
        grammar,
        text,
        prefix,
        furthest: 0,
        expected: Vec::new(),
    };
    let items = [Item::Rule(rule.to_string())];
    let frame = Frame {
        items: &items,
        outer: None,
    };
    let mut bound = vec![None; grammar.variables.len()];
    if reader.read(Some(&frame), 0, &mut bound) {
        Ok(())
    } else {
        Err(reader.reason())
    }
}

#[derive(Default)]
struct Grammar {
    tables: HashMap<String, Table>,
    variables: Vec<Variable>,
    rules: HashMap<String, Vec<Vec<Item>>>,
}

struct Table {
    columns: Vec<String>,
    rows: Vec<Vec<String>>,
}

struct Variable {
    name: String,
    table: String,
    /// Variables of the same table that must be bound to another row.
    apart: Vec<usize>,
    /// A column of this table, and the variable whose first cell it must equal.
    ties: Vec<(usize, usize)>,
}

enum Item {
    Text(String),
    Cell {
        variable: usize,
        column: usize,
        capital: bool,
    },
    Rule(String),
    Choice(Vec<Vec<Item>>),
}

/// The file belongs to the repository, so what it cannot mean is a panic that names the line.
impl Grammar {
    fn parse(source: &str) -> Self {
        enum Section {
            None,
            Table(String),
            Rule(String),
            Sequence(String),
        }
        let mut grammar = Self::default();
        let mut raw: HashMap<String, Vec<String>> = HashMap::new();
        let mut section = Section::None;
        for line in source.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(rest) = line.strip_prefix("table ") {
                let (name, columns) = rest.split_once(": ").expect(line);
                let table = Table {
                    columns: columns.split_whitespace().map(String::from).collect(),
                    rows: Vec::new(),
                };
                grammar.tables.insert(name.to_string(), table);
                section = Section::Table(name.to_string());
            } else if let Some(rest) = line.strip_prefix("let ") {
                let variable = grammar.variable(rest);
                grammar.variables.push(variable);
                section = Section::None;
            } else if let Some(name) = line.strip_prefix("rule ") {
                raw.insert(name.to_string(), Vec::new());
                section = Section::Rule(name.to_string());
            } else if let Some(name) = line.strip_prefix("seq ") {
                raw.insert(name.to_string(), vec![String::new()]);
                section = Section::Sequence(name.to_string());
            } else {
                match &section {
                    Section::Table(name) => {
                        let row = line.split('|').map(|cell| cell.trim().to_string());
                        let table = grammar.tables.get_mut(name).expect(line);
                        table.rows.push(row.collect());
                    }
                    Section::Rule(name) => {
                        let alternative = line.strip_prefix("- ").expect(line).to_string();
                        raw.get_mut(name).expect(line).push(alternative);
                    }
                    Section::Sequence(name) => {
                        let joined = &mut raw.get_mut(name).expect(line)[0];
                        if line == "---" {
                            joined.push_str("\n\n");
                        } else {
                            if !joined.is_empty() && !joined.ends_with('\n') {
                                joined.push(' ');
                            }
                            joined.push_str(line);
                        }
                    }
                    Section::None => panic!("not understood: {line}"),
                }
            }
        }
        for (name, alternatives) in raw {
            let sequences = alternatives
                .iter()
                .map(|text| grammar.sequence(&text.replace("\\t", "\t")))
                .collect();
            grammar.rules.insert(name, sequences);
        }
        grammar
    }

    /// `NAME: TABLE not X Y COLUMN=Z`, after `let`.
    fn variable(&self, rest: &str) -> Variable {
        let (name, rest) = rest.split_once(": ").expect(rest);
        let mut words = rest.split_whitespace();
        let table = words.next().expect(rest).to_string();
        let (mut apart, mut ties) = (Vec::new(), Vec::new());
        for word in words.filter(|word| *word != "not") {
            match word.split_once('=') {
                Some((column, other)) => {
                    ties.push((self.column(&table, column), self.index(other)));
                }
                None => apart.push(self.index(word)),
            }
        }
        Variable {
            name: name.to_string(),
            table,
            apart,
            ties,
        }
    }

    fn index(&self, name: &str) -> usize {
        let found = self.variables.iter().position(|v| v.name == name);
        found.unwrap_or_else(|| panic!("no variable {name}"))
    }

    fn column(&self, table: &str, name: &str) -> usize {
        let found = self.tables[table].columns.iter().position(|c| c == name);
        found.unwrap_or_else(|| panic!("table {table} has no column {name}"))
    }

    fn sequence(&self, text: &str) -> Vec<Item> {
        let mut items = Vec::new();
        let mut rest = text;
        while let Some(open) = rest.find(['{', '<', '[']) {
            if open > 0 {
                items.push(Item::Text(rest[..open].to_string()));
            }
            let close = match rest.as_bytes()[open] {
                b'{' => '}',
                b'<' => '>',
                _ => ']',
            };
            let end = open + rest[open..].find(close).expect(rest);
            let inner = &rest[open + 1..end];
            items.push(match close {
                '}' => self.cell(inner),
                '>' => Item::Rule(inner.to_string()),
                _ => Item::Choice(inner.split('|').map(|part| self.sequence(part)).collect()),
            });
            rest = &rest[end + 1..];
        }
        if !rest.is_empty() {
            items.push(Item::Text(rest.to_string()));
        }
        items
    }

    /// `v` or `v.column`, from between braces.
    fn cell(&self, inner: &str) -> Item {
        let (variable, column) = inner.split_once('.').unwrap_or((inner, ""));
        let variable = self.index(variable);
        let table = &self.variables[variable].table;
        Item::Cell {
            variable,
            column: match column {
                "" => 0,
                name => self.column(table, &name.to_lowercase()),
            },
            capital: column.starts_with(char::is_uppercase),
        }
    }

    fn rows(&self, variable: usize) -> &[Vec<String>] {
        &self.tables[&self.variables[variable].table].rows
    }

    /// Whether `variable` may be bound to `row`, given what is bound.
    fn fits(&self, variable: usize, row: usize, bound: &[Option<usize>]) -> bool {
        let spec = &self.variables[variable];
        let apart = spec.apart.iter().all(|&other| bound[other] != Some(row));
        apart
            && spec.ties.iter().all(|&(column, other)| {
                bound[other].is_none_or(|there| {
                    self.rows(variable)[row][column] == self.rows(other)[there][0]
                })
            })
    }
}

/// What is still to be read of one rule, and of the rules around it.
struct Frame<'a> {
    items: &'a [Item],
    outer: Option<&'a Frame<'a>>,
}

struct Reader<'a> {
    grammar: &'a Grammar,
    text: &'a str,
    prefix: bool,
    furthest: usize,
    expected: Vec<String>,
}

/// How a literal was met.
enum Met {
    Whole(usize),
    /// The text, which is only a beginning, ended in it.
    Cut,
    No,
}

impl Reader<'_> {
    /// Whether the text from `at` on is what `frame` stands for.
    fn read(&mut self, frame: Option<&Frame<'_>>, at: usize, bound: &mut [Option<usize>]) -> bool {
        let Some(frame) = frame else {
            if at < self.text.len() {
                self.refuse("the end", at);
            }
            return at == self.text.len();
        };
        let Some((item, rest)) = frame.items.split_first() else {
            return self.read(frame.outer, at, bound);
        };
        let rest = Frame {
            items: rest,
            outer: frame.outer,
        };
        let grammar = self.grammar;
        match item {
            Item::Text(literal) => match self.meet(literal, at) {
                Met::Whole(after) => self.read(Some(&rest), after, bound),
                Met::Cut => true,
                Met::No => false,
            },
            Item::Cell {
                variable,
                column,
                capital,
            } => {
                let before = bound[*variable];
                let rows = match before {
                    Some(row) => row..row + 1,
                    None => 0..grammar.rows(*variable).len(),
                };
                for row in rows {
                    if before.is_none() && !grammar.fits(*variable, row, bound) {
                        continue;
                    }
                    let cell = &grammar.rows(*variable)[row][*column];
                    let met = match capital {
                        true => self.meet(&capitalized(cell), at),
                        false => self.meet(cell, at),
                    };
                    match met {
                        Met::Whole(after) => {
                            bound[*variable] = Some(row);
                            if self.read(Some(&rest), after, bound) {
                                return true;
                            }
                            bound[*variable] = before;
                        }
                        Met::Cut => return true,
                        Met::No => {}
                    }
                }
                false
            }
            Item::Rule(name) => {
                let rule = grammar.rules.get(name);
                let alternatives = rule.unwrap_or_else(|| panic!("no rule {name}"));
                self.read_any(alternatives, &rest, at, bound)
            }
            Item::Choice(alternatives) => self.read_any(alternatives, &rest, at, bound),
        }
    }

    fn read_any(
        &mut self,
        alternatives: &[Vec<Item>],
        rest: &Frame<'_>,
        at: usize,
        bound: &mut [Option<usize>],
    ) -> bool {
        alternatives.iter().any(|items| {
            let frame = Frame {
                items,
                outer: Some(rest),
            };
            self.read(Some(&frame), at, bound)
        })
    }

    fn meet(&mut self, literal: &str, at: usize) -> Met {
        let here = &self.text[at..];
        if here.starts_with(literal) {
            return Met::Whole(at + literal.len());
        }
        if self.prefix && literal.starts_with(here) {
            return Met::Cut;
        }
        let same = literal
            .chars()
            .zip(here.chars())
            .take_while(|(expected, found)| expected == found);
        let same: usize = same.map(|(c, _)| c.len_utf8()).sum();
        self.refuse(literal, at + same);
        Met::No
    }

    fn refuse(&mut self, literal: &str, at: usize) {
        if at > self.furthest {
            self.furthest = at;
            self.expected.clear();
        }
        if at == self.furthest && !self.expected.iter().any(|known| known == literal) {
            self.expected.push(literal.to_string());
        }
    }

    fn reason(mut self) -> String {
        self.expected.sort();
        self.expected.truncate(4);
        let (before, after) = self.text.split_at(self.furthest);
        let tail = before.char_indices().rev().nth(39).map_or(0, |(at, _)| at);
        let found: String = after.chars().take(20).collect();
        format!(
            "at byte {}, after {:?}: expected {:?}, found {:?}",
            self.furthest,
            &before[tail..],
            self.expected.join(" | "),
            if found.is_empty() { "the end" } else { &found },
        )
    }
}

fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(letters).collect()
    })
}
