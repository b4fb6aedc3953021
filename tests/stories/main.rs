//! The acceptor itself: it takes the held-out stories that come with each story checkpoint, and refuses each of them
//! once one word no longer agrees with the rest.

mod grammar;

use std::fs;
use std::path::Path;

use grammar::{accept, accept_chat, accept_chat_prefix, accept_prefix};

const LOST: &str = "Once upon a time, there was a kind girl named Zoe. She had an orange blanket and took it \
everywhere.\n\nOne windy morning, Zoe took the orange blanket to the beach. The wind shook the trees. She stopped to \
watch an owl. When she looked back, the orange blanket was gone. \"Oh no! Where is my orange blanket?\" cried Zoe. \
First she looked under the wooden pier. Then she looked next to a fishing net. There was no blanket.\n\nHer friend \
Eli saw that she was sad. \"Did you lose your blanket?\" asked Eli. Zoe nodded. \"Then we will look for it together,\" \
said Eli. They looked and looked. At last Eli found the orange blanket near the tide pool. Zoe thanked Eli and gave \
him a big hug. By the time they got home, the wind had grown calm.\n\nZoe never forgot how Eli had helped her. Good \
friends find a way together.";

/// The stories of `heldout.txt`: what stands between special tokens.
fn held_out(checkpoint: &str) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/checkpoints");
    let text = fs::read_to_string(root.join(checkpoint).join("heldout.txt")).unwrap();
    let text = text.replace("<s>", "").replace("<|endoftext|>", "</s>");
    let stories = text.split("</s>").filter(|story| !story.is_empty());
    stories.map(String::from).collect()
}

#[test]
fn held_out_stories_are_accepted() {
    for checkpoint in [
        "stories-llama-fp8-dynamic",
        "stories-llama-fp8-static",
        "stories-qwen3-moe-fp8-dynamic",
    ] {
        let stories = held_out(checkpoint);
        assert!(stories.len() >= 15, "{checkpoint}: {}", stories.len());
        for story in stories {
            accept(&story).unwrap_or_else(|reason| panic!("{checkpoint}: {reason}\n{story}"));
        }
    }
}

#[test]
fn every_beginning_is_a_beginning_and_not_a_story() {
    for end in 0..LOST.len() {
        let beginning = &LOST[..end];
        accept_prefix(beginning).unwrap_or_else(|reason| panic!("{beginning:?}: {reason}"));
        accept(beginning).expect_err("half a story is none");
    }
    accept_prefix(LOST).unwrap();
    accept_prefix(&format!("{LOST} And")).expect_err("nothing follows the moral");
}

#[test]
fn a_story_that_contradicts_itself_is_refused() {
    accept(LOST).unwrap();
    let cases = [
        // (what changes, to what, what the reason says)
        ("She had an", "He had an", "expected \"Her\""),
        ("She had an orange", "She had a orange", "expected"),
        (
            "Zoe took the orange",
            "Zoe took the purple",
            "expected \"orange\"",
        ),
        ("cried Zoe", "cried Eli", "expected \"Zoe\""),
        // The fountain is in the park, not at the beach.
        (
            "near the tide pool",
            "beside the fountain",
            "behind a sandy dune",
        ),
        // Looked there already: the blanket was not there.
        (
            "near the tide pool",
            "under the wooden pier",
            "near the tide pool",
        ),
        ("gave him", "gave her", "expected \"him\""),
        (
            "the wind had grown calm",
            "the rain had stopped",
            "the wind had",
        ),
        ("how Eli", "how Tom", "expected \"Eli\""),
        // Another plot's moral.
        (
            "Zoe never forgot how Eli had helped her. Good friends find a way together.",
            "Zoe learned that good things take time.",
            "expected",
        ),
        (" Zoe thanked Eli and gave him a big hug.", "", "expected"),
    ];
    for (from, to, says) in cases {
        assert!(LOST.contains(from), "{from:?}");
        let reason = accept(&LOST.replacen(from, to, 1)).expect_err(to);
        assert!(reason.contains(says), "{from:?} -> {to:?}: {reason}");
    }
}

#[test]
fn numbers_must_add_up() {
    let story = "Ivy was a kind girl who lived in a small cottage. One sunny morning, her aunt gave her a bowl with \
        five muffins. The sun was high and warm.\n\nIvy carried the bowl to the garden. She saw Omar behind the shed. \
        Omar had nothing to eat. Ivy thought about it for a moment. She gave two muffins to Omar. \"You are so kind, \
        Ivy!\" said Omar.\n\nThere were three muffins left for Ivy. That was more than enough. At home Ivy told her \
        aunt about Omar. \"You had five muffins, and you gave away two,\" said her aunt. \"That was kind of \
        you.\"\n\nIvy learned that sharing makes everything taste better.";
    accept(story).unwrap();
    accept(&story.replacen("three", "four", 1)).expect_err("five less two is three");
    accept(&story.replacen("gave away two", "gave away three", 1)).expect_err("two were given");
    accept(&story.replacen("had five", "had six", 1)).expect_err("five were there");
}

#[test]
fn a_story_answers_its_request() {
    let request = "Tell me a story about Zoe and a lost blanket.";
    accept_chat(request, LOST).unwrap();
    accept_chat_prefix(request, &LOST[..200]).unwrap();
    accept_chat("Tell me a story about Zoe and a lost kite.", LOST).expect_err("a blanket is lost");
    accept_chat("Tell me a story about Mia and a lost blanket.", LOST).expect_err("of Zoe");
    accept_chat("Tell me how Zoe learned to swim.", LOST).expect_err("another plot");
    accept_chat("Sing a song.", LOST).expect_err("no request of the grammar");
}

#[test]
fn text_that_is_no_story_is_refused() {
    for text in [
        "",
        " ",
        "Once",
        "É",
        "</s>",
        "Once upon a time, there was a é",
    ] {
        accept(text).expect_err(text);
    }
    accept(&format!("{LOST}</s>")).expect_err("special tokens are not part of a story");
    accept(&format!("\n{LOST}\n")).expect("space around it is ignored");
}
