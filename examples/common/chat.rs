//! Chat templates: how a checkpoint wants a conversation written, as a Jinja template that it brings along.

use std::{collections::BTreeMap, io};

use anyhow::{Context, anyhow, bail};
use candle_compressed_tensors::Checkpoint;
use minijinja::{
    Environment, Error, ErrorKind, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde},
};
use serde::Serialize;
use serde_json::{Value as Json, ser::PrettyFormatter};

use crate::{model::read_json, strftime::strftime_now};

const NAME: &str = "chat_template";

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// The chat template of a checkpoint.
///
/// Templates see what transformers shows them: `messages`, `add_generation_prompt`, the special tokens by name, no tools,
/// `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, Python's methods of strings and dicts, `break`
/// and `continue`; blocks take the newline after them and the blanks before them along.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token`, `eos_token`, …: those that the checkpoint has.
    special_tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// The template of `checkpoint`: `chat_template.jinja`, else that of `chat_template.json`, else that of
    /// `tokenizer_config.json`; of several the one called `default`. `None` if there is none.
    ///
    /// # Errors
    /// A file cannot be read, or the template does not parse.
    pub fn find(checkpoint: &Checkpoint) -> anyhow::Result<Option<Self>> {
        let config = read_json(checkpoint, "tokenizer_config.json")?.unwrap_or_default();
        let source = match checkpoint.file("chat_template.jinja") {
            Some(path) => Some(
                std::fs::read_to_string(&path)
                    .with_context(|| format!("cannot read {}", path.display()))?,
            ),
            None => {
                let own = read_json(checkpoint, "chat_template.json")?.unwrap_or_default();
                match template_in(&own)? {
                    Some(template) => Some(template),
                    None => template_in(&config)?,
                }
            }
        };
        let Some(source) = source else {
            return Ok(None);
        };
        let map = read_json(checkpoint, "special_tokens_map.json")?.unwrap_or_default();
        let mut tokens = special_tokens(&map);
        tokens.extend(special_tokens(&config));
        let template = Self::new(&source, tokens)
            .with_context(|| format!("the chat template of {}", checkpoint.dir().display()))?;
        Ok(Some(template))
    }

    /// A template, and the special tokens that it may name (`bos_token`, …).
    ///
    /// # Errors
    /// The template does not parse.
    pub fn new(source: &str, special_tokens: BTreeMap<String, String>) -> anyhow::Result<Self> {
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        environment.set_syntax(syntax.trim_blocks(true).lstrip_blocks(true).build()?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_function("strftime_now", |format: &str| {
            strftime_now(format).map_err(|reason| Error::new(ErrorKind::InvalidOperation, reason))
        });
        environment.add_filter("tojson", tojson);
        environment.add_template_owned(NAME, without_generation_tags(source))?;
        Ok(Self {
            environment,
            special_tokens,
        })
    }

    /// The text of a conversation, up to where the assistant's answer starts. Special tokens are in it, by name.
    ///
    /// # Errors
    /// The template refuses the conversation, or uses something that is not known here.
    pub fn render(&self, messages: &[Message]) -> anyhow::Result<String> {
        #[derive(Serialize)]
        struct Context<'a> {
            messages: &'a [Message],
            add_generation_prompt: bool,
            tools: Option<()>,
            documents: Option<()>,
            #[serde(flatten)]
            special_tokens: &'a BTreeMap<String, String>,
        }
        let template = self.environment.get_template(NAME)?;
        Ok(template.render(Serde(Context {
            messages,
            add_generation_prompt: true,
            tools: None,
            documents: None,
            special_tokens: &self.special_tokens,
        }))?)
    }
}

/// The value of `chat_template`: a string, or a list of templates with names.
fn template_in(config: &Json) -> anyhow::Result<Option<String>> {
    let named = |entry: &Json| {
        let name = entry.get("name")?.as_str()?;
        Some((
            name.to_string(),
            entry.get("template")?.as_str()?.to_string(),
        ))
    };
    match config.get(NAME) {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(template)) => Ok(Some(template.clone())),
        Some(Json::Array(list)) => {
            let templates: Option<Vec<_>> = list.iter().map(named).collect();
            let templates = templates.ok_or_else(|| {
                anyhow!("a list in `chat_template` must hold objects with `name` and `template`")
            })?;
            let default = templates.iter().find(|(name, _)| name == "default");
            let chosen = default.or(templates.first());
            Ok(chosen.map(|(_, template)| template.clone()))
        }
        Some(other) => {
            bail!("`chat_template` must be a string or a list of templates, found {other}")
        }
    }
}

/// `bos_token`, `eos_token` and the like: strings, or objects whose `content` is the token.
pub(crate) fn special_tokens(config: &Json) -> BTreeMap<String, String> {
    let entries = config.as_object().into_iter().flatten();
    let token = |(key, value): (&String, &Json)| {
        let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
        key.ends_with("_token")
            .then(|| (key.clone(), text.to_string()))
    };
    entries.filter_map(token).collect()
}

/// Templates made for training mark the assistant's words with `{% generation %} … {% endgeneration %}`, which Jinja itself
/// does not know; here the marks only have to vanish.
fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(end) = rest.find("%}") {
        let Some(start) = rest[..end].rfind("{%") else {
            break;
        };
        let inner = &rest[start + 2..end];
        let word = inner.trim_matches(['-', '+']).trim();
        let instead = match word {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        text.push_str(&rest[..start + 2]);
        match instead {
            Some(tag) => text.push_str(&inner.replacen(word, tag, 1)),
            None => text.push_str(inner),
        }
        text.push_str("%}");
        rest = &rest[end + 2..];
    }
    text + rest
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it.
fn tojson(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<Value, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<usize>>("indent")?,
    };
    let bad = |error: serde_json::Error| {
        Error::new(ErrorKind::InvalidOperation, "tojson: not JSON").with_source(error)
    };
    let mut bytes = Vec::new();
    match indent {
        Some(indent) => {
            let spaces = vec![b' '; indent];
            let formatter = PrettyFormatter::with_indent(&spaces);
            let mut writer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
            value.serialize(&mut writer).map_err(bad)?;
        }
        None => {
            let mut writer = serde_json::Serializer::with_formatter(&mut bytes, Spaced);
            value.serialize(&mut writer).map_err(bad)?;
        }
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned().into())
}

/// Python's separators: `, ` and `: `.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: &[(&str, &str)]) -> anyhow::Result<String> {
        let tokens = special_tokens(&json!({
            "bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "unk_token": null,
            "add_bos_token": true, "chat_template": "x",
        }));
        let messages: Vec<_> = messages
            .iter()
            .map(|&(role, content)| Message {
                role: role.into(),
                content: content.into(),
            })
            .collect();
        ChatTemplate::new(source, tokens)?.render(&messages)
    }

    /// Written as Llama 3's templates are: one-line blocks on lines of their own, headers, trimmed content.
    #[test]
    fn blocks_take_their_line_along() {
        let template = "{{- bos_token }}\n\
            {%- if not tools is defined %}\n    {%- set tools = none %}\n{%- endif %}\n\
            {%- if messages[0]['role'] == 'system' %}\n\
            {%- set system = messages[0]['content'] | trim %}\n    {%- set messages = messages[1:] %}\n\
            {%- else %}\n    {%- set system = 'Be brief.' %}\n{%- endif %}\n\
            {{- '<sys>' + system }}\n\
            {% for message in messages %}\n    {% if message.role not in ['user', 'assistant'] %}\n\
            {{ raise_exception('unknown role ' + message.role) }}\n    {% endif %}\n\
            [{{ message.role }}] {{ message['content'] | trim }}{{ eos_token }}\n{% endfor %}\n\
            {% if add_generation_prompt and tools is none %}[assistant]{% endif %}\n";
        assert_eq!(
            render(template, &[("user", " Hi \n"), ("assistant", "Ho")]).unwrap(),
            "<s><sys>Be brief.\n[user] Hi</s>\n[assistant] Ho</s>\n[assistant]"
        );
        assert_eq!(
            render(template, &[("system", " Rhyme "), ("user", "Hi")]).unwrap(),
            "<s><sys>Rhyme\n[user] Hi</s>\n[assistant]"
        );
        let refused = render(template, &[("tool", "Hi")]).unwrap_err();
        assert!(
            format!("{refused:#}").contains("unknown role tool"),
            "{refused:#}"
        );
    }

    /// Written as Qwen3's are: Python's string methods, slices, namespaces.
    #[test]
    fn python_methods_work() {
        let template = "{%- set ns = namespace(last=-1) %}\n\
            {%- for message in messages[::-1] %}\n\
            {%- if message.content is string and message.content.startswith('Q') %}\n\
            {%- set ns.last = messages | length - 1 - loop.index0 %}{% break %}\n{%- endif %}\n{%- endfor %}\n\
            {%- for message in messages %}\n\
            {%- set content = message.content %}\n\
            {%- if '</think>' in content %}\n\
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}\n\
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}{{- '(' + thought.upper() + ')' }}\n\
            {%- endif %}\n\
            {{- content.replace('a', 'b') + '|' }}{%- for key, value in message.items() %}{{ key }};{% endfor %}\n\
            {%- endfor %}{{ ns.last }}{% if enable_thinking is defined %}!{% endif %}";
        let messages = [("user", "Q"), ("assistant", "<think>\nhm\n</think>\n\nban")];
        assert_eq!(
            render(template, &messages).unwrap(),
            "Q|role;content;(HM)bbn|role;content;0"
        );
    }

    #[test]
    fn json_looks_like_pythons() {
        let json = |template: &str| render(template, &[("user", "<a> & 'é' \"\n")]).unwrap();
        assert_eq!(
            json("{{ messages | tojson }}"),
            r#"[{"role": "user", "content": "<a> & 'é' \"\n"}]"#
        );
        assert_eq!(
            json("{{ {'a': [1, none, true]} | tojson(indent=2) }}"),
            "{\n  \"a\": [\n    1,\n    null,\n    true\n  ]\n}"
        );
    }

    #[test]
    fn generation_tags_vanish() {
        let template = "a\n{%- generation -%}\n b \n{%- endgeneration -%}\n c {{ '{%' }}{% generation %}d{% endgeneration %}";
        assert_eq!(render(template, &[]).unwrap(), "abc {%d");
    }

    #[test]
    fn dates() {
        let year = render("{{ strftime_now('%Y') }}", &[]).unwrap();
        assert!(
            year.len() == 4 && year.parse::<u32>().unwrap() >= 2024,
            "{year}"
        );
        let error = render("{{ strftime_now('%') }}", &[]).unwrap_err();
        assert!(error.to_string().contains("ends in"), "{error}");
    }

    #[test]
    fn templates_that_do_not_parse_are_refused() {
        let error = render("{% if %}", &[]).unwrap_err();
        assert!(error.to_string().contains("syntax error"), "{error}");
    }

    #[test]
    fn of_several_templates_the_default_is_taken() {
        let list = |names: &[&str]| {
            let list: Vec<_> = names
                .iter()
                .map(|n| json!({"name": n, "template": format!("t {n}")}))
                .collect();
            template_in(&json!({ "chat_template": list })).unwrap()
        };
        assert_eq!(list(&["tool_use", "default"]).as_deref(), Some("t default"));
        assert_eq!(list(&["rag", "tool_use"]).as_deref(), Some("t rag"));
        assert_eq!(list(&[]), None);
        assert_eq!(template_in(&json!({"chat_template": null})).unwrap(), None);
        assert_eq!(template_in(&json!({})).unwrap(), None);
        assert!(template_in(&json!({"chat_template": 3})).is_err());
        assert!(template_in(&json!({"chat_template": ["x"]})).is_err());
    }
}
