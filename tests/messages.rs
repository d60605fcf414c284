//! Every message that users may see, in one file, so that each change of one is reviewed.
//!
//! `tests/golden/messages.txt` lists what the sources say in errors, by file, in order;
//! `tests/golden/help.txt` what `--help` says of each command. After a change that is meant:
//! `PAVO_UPDATE_GOLDEN=1 cargo test --test messages`, and read the difference.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// Calls whose texts are messages, and what they are.
const CALLS: &[(&str, &str)] = &[
    ("Error::usage(", "usage"),
    ("Error::config(", "config"),
    ("Error::not_found(", "not found"),
    ("Error::system(", "system"),
    ("Error::bug(", "bug"),
    ("Error::new(", "error"),
    (".while_doing(", "doing"),
    (".because(", "because"),
    (".help(", "help"),
    (".problem(", "problem"),
    (".warn(", "warning"),
    ("out.status(", "status"),
    ("out.progress(", "progress"),
    ("let doing =", "doing"),
    ("let text =", "text"),
    ("let what =", "text"),
    ("let why =", "text"),
    ("let failed =", "text"),
    // What is said by way of a variable, or of a function.
    ("format!(", "text"),
];

fn sources(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> = entries
        .flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] })
        .filter(|path| path.extension().is_some_and(|ext| ext == "rs"))
        .filter(|path| !path.ends_with("tests.rs") && !path.ends_with("testing.rs"))
        .collect();
    found.sort();
    found
}

/// One text of a file: where it ends, what it is for the reader.
struct Literal {
    at: usize,
    end: usize,
    text: String,
}

/// The string literals of Rust code, and the code with everything else that is no code
/// (comments, literals) blanked, of the same length.
fn scan(code: &str) -> (Vec<Literal>, String) {
    let bytes = code.as_bytes();
    let (mut literals, mut bare) = (Vec::new(), bytes.to_vec());
    let mut at = 0;
    while at < bytes.len() {
        let rest = &code[at..];
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if let Some(hashes) = raw(rest) {
            let close = format!("\"{}", "#".repeat(hashes));
            let open = hashes + 2;
            let end = open + rest[open..].find(&close).unwrap();
            let text = rest[open..end].to_owned();
            let end = end + close.len();
            literals.push(Literal { at, end: at + end, text });
            end
        } else if rest.starts_with('"') {
            let end = quoted(rest);
            literals.push(Literal { at, end: at + end, text: unescaped(&rest[1..end - 1]) });
            end
        } else if let Some(length) = letter(rest) {
            length
        } else {
            at += rest.chars().next().unwrap().len_utf8();
            continue;
        };
        bare[at..at + length].fill(b' ');
        at += length;
    }
    (literals, String::from_utf8(bare).unwrap())
}

/// `r"`, `r#"`, …: how many `#`.
fn raw(rest: &str) -> Option<usize> {
    let after = rest.strip_prefix('r')?;
    let hashes = after.bytes().take_while(|byte| *byte == b'#').count();
    after[hashes..].starts_with('"').then_some(hashes)
}

/// The length of a literal that begins here, its quotes included.
fn quoted(rest: &str) -> usize {
    let mut escaped = false;
    for (index, byte) in rest.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return index + 1,
            _ => {}
        }
    }
    panic!("a literal has no end");
}

/// A character literal; a lifetime is none.
fn letter(rest: &str) -> Option<usize> {
    let after = rest.strip_prefix('\'')?;
    let mut letters = after.char_indices();
    let (_, first) = letters.next()?;
    if first == '\\' {
        return Some(2 + after[1..].char_indices().skip(1).find(|(_, it)| *it == '\'')?.0 + 1);
    }
    let (end, next) = letters.next()?;
    (next == '\'').then_some(1 + end + 1)
}

/// A literal as it is read, in one line.
fn unescaped(text: &str) -> String {
    let mut all = String::new();
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        match (letter, letters.peek()) {
            ('\\', Some('\n')) => while letters.next_if(|next| next.is_whitespace()).is_some() {},
            ('\\', Some('"' | '\\')) => all.extend(letters.next()),
            _ => all.push(letter),
        }
    }
    all.replace('\n', "\\n")
}

/// Where the call or statement that begins at `start` ends.
fn end_of(bare: &str, start: usize) -> usize {
    let mut depth = 0;
    for (index, byte) in bare.bytes().enumerate().skip(start) {
        match byte {
            b'(' | b'{' | b'[' => depth += 1,
            b')' | b'}' | b']' => depth -= 1,
            b';' if depth == 0 => return index,
            _ => continue,
        }
        if depth < 0 || (depth == 0 && byte == b')') {
            return index;
        }
    }
    bare.len()
}

/// The messages of one file.
fn messages(code: &str) -> Vec<(&'static str, String)> {
    let (literals, bare) = scan(code);
    let mut calls: Vec<(usize, usize, &'static str)> = Vec::new();
    for (call, kind) in CALLS {
        for (at, _) in bare.match_indices(call) {
            let open = if call.ends_with('(') { at + call.len() - 1 } else { at + call.len() };
            calls.push((open, end_of(&bare, open), kind));
        }
    }
    let mut found = Vec::new();
    for literal in literals {
        let around =
            calls.iter().filter(|(open, end, _)| *open < literal.at && literal.end <= *end);
        // The innermost that says what it is.
        let innermost = around.max_by_key(|(open, _, kind)| (*kind != "text", *open));
        let Some((_, _, kind)) = innermost else { continue };
        let is_said = literal.text.contains(|letter: char| letter.is_alphabetic());
        if is_said && (*kind != "text" || is_sentence(&literal.text)) {
            found.push((*kind, literal.text));
        }
    }
    found
}

/// Whether a text is more than a name, a path or an option.
fn is_sentence(text: &str) -> bool {
    let mut words = text.split(' ').filter(|word| word.chars().all(|it| it.is_alphabetic()));
    // Several lines are a script, or a file.
    let is_help = text.contains("help:") || text.contains("because:");
    let is_script = text.contains("\\n") && !is_help;
    words.next().is_some() && text.contains(' ') && !text.starts_with(['/', '-']) && !is_script
}

fn all_messages() -> String {
    let mut all = String::new();
    for path in sources(Path::new("src")) {
        let text = fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        let found = messages(code);
        if !found.is_empty() {
            let _ = writeln!(all, "\n{}", path.display());
        }
        for (kind, text) in found {
            let _ = writeln!(all, "  {kind:9}  {text}");
        }
    }
    all.trim_start().to_owned()
}

/// What `--help` says, of every command.
fn all_help(command: &mut clap::Command, path: &str, all: &mut String) {
    let path = format!("{path} {}", command.get_name()).trim_start().to_owned();
    let _ = writeln!(all, "==== {path}\n{}", command.render_long_help());
    let below = command.get_subcommands_mut().filter(|it| it.get_name() != "help");
    below.for_each(|below| all_help(below, &path, all));
}

#[track_caller]
fn agrees(name: &str, now: &str) {
    let path = Path::new("tests/golden").join(name);
    if std::env::var_os("PAVO_UPDATE_GOLDEN").is_some() {
        fs::write(&path, now).unwrap();
        return;
    }
    let golden = fs::read_to_string(&path).unwrap_or_default();
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let (was, is) = (lines(&golden), lines(now));
    let gone = was.iter().filter(|line| !is.contains(line)).map(|line| format!("- {line}"));
    let come = is.iter().filter(|line| !was.contains(line)).map(|line| format!("+ {line}"));
    let differ: Vec<String> = gone.chain(come).collect();
    assert!(
        was == is,
        "{}\nif this is meant: PAVO_UPDATE_GOLDEN=1 cargo test --test messages, and review {}",
        differ.join("\n"),
        path.display()
    );
}

#[test]
fn every_message_is_as_it_was_reviewed() {
    agrees("messages.txt", &all_messages());
}

#[test]
fn every_help_text_is_as_it_was_reviewed() {
    let mut all = String::new();
    // At the width of a terminal, whatever this one has.
    let mut command = pavo::cli::command().term_width(80);
    command.build();
    all_help(&mut command, "", &mut all);
    let lines: Vec<&str> = all.lines().map(str::trim_end).collect();
    agrees("help.txt", &(lines.join("\n") + "\n"));
}

#[test]
fn errors_are_written_alike() {
    // Words of pcocc's that scripts may look for.
    let pcocc = [
        "Duplicate repository: {name}",
        "Error: port 22 is not reverse NATed",
        "Error: port 22 is not reverse NATed for vm{rank}",
        "Failure in job allocation: already in a job",
        "Image {name} already exists in repo {}",
        "Object {name} not found in configured repositories",
        "Object {} not found in configured repositories",
        "Only a single cache can be configured",
        "Template not found: {name}",
        "Template not found: {}",
        "Unable to find job: name {name} is ambiguous",
        "Unable to find job: no valid match for name {name}",
        "Unable to parse cluster definition: '{}'",
        "Unable to find a free host port for reverse NAT",
        "VM has no drive to save",
        "Provided drive index ({}) is invalid",
    ];
    let mut wrong = Vec::new();
    for line in all_messages().lines().filter(|line| line.starts_with("  ")) {
        let (kind, text) = line[2..].split_at(9);
        let (kind, text) = (kind.trim(), text.trim_start());
        let is_sentence = matches!(kind, "status" | "progress" | "warning" | "text");
        let first = text.chars().next().unwrap_or(' ');
        // A name may have a capital: QEMU, Slurm, SLURM_JOB_ID.
        let word: String = text.chars().take_while(|it| it.is_alphanumeric()).collect();
        let is_name = ["Slurm", "Open", "KVM", "QEMU", "VMs"].contains(&&*word)
            || word.chars().filter(|it| it.is_uppercase()).count() > 1;
        if !is_sentence && first.is_uppercase() && !is_name && !pcocc.contains(&text) {
            wrong.push(format!("it begins with a capital: {text}"));
        }
        if !is_sentence && text.ends_with('.') && !text.ends_with("..") {
            wrong.push(format!("it ends with a full stop: {text}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn texts_are_found_whatever_stands_around_them() {
    let code = r###"
        // Error::usage("in a comment")
        let quote = '"'; let life: &'static str = "not one";
        Err(Error::system(format!("it `{}` \"fails\" \
             here", x)).help(r#"say "so""#))
        let text = if a { "one of" } else { "/two of" };
        Error::bug(text).because(io("other"))
    "###;
    let found = messages(code);
    let found: Vec<(&str, &str)> = found.iter().map(|(kind, text)| (*kind, &**text)).collect();
    let expected = [
        ("system", "it `{}` \"fails\" here"),
        ("help", "say \"so\""),
        ("text", "one of"),
        ("because", "other"),
    ];
    assert_eq!(found, expected);
}
