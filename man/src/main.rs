//! Writes pavo's manual pages: `make man`.
//!
//! Pages of commands come from the command tree, so that they say what `--help` says.
//! `pavo-config.5` is written by hand, but for the examples of `etc/`, which it holds as
//! they are.

use std::io::Result;
use std::path::{Path, PathBuf};
use std::{env, fs};

use clap::{Arg, Command};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

const CONFIG: &str = include_str!("../pavo-config.5");
/// Each stands in [`CONFIG`] where a line names it.
const EXAMPLES: [(&str, &str); 5] = [
    ("batch.yaml", include_str!("../../etc/batch.yaml")),
    ("networks.yaml", include_str!("../../etc/networks.yaml")),
    ("resources.yaml", include_str!("../../etc/resources.yaml")),
    ("repos.yaml", include_str!("../../etc/repos.yaml")),
    ("templates.yaml", include_str!("../../etc/templates.yaml")),
];

fn main() -> Result<()> {
    let dir = env::args_os().nth(1).map_or_else(|| "target/man".into(), PathBuf::from);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    write_all(&dir)
}

fn write_all(dir: &Path) -> Result<()> {
    let mut pavo = pavo::cli::command().disable_help_subcommand(true);
    pavo.build();
    commands(&pavo, dir)?;
    let setup = pavo.find_subcommand("internal").and_then(|it| it.find_subcommand("setup"));
    write(dir, "pavo-setup.8", &setup.map_or(Ok(String::new()), setup_page)?)?;
    write(dir, "pavo-config.5", &config())
}

fn write(dir: &Path, name: &str, text: &str) -> Result<()> {
    fs::write(dir.join(name), text)
}

/// A page for the command and for each one below it, but for those that are hidden.
fn commands(command: &Command, dir: &Path) -> Result<()> {
    for below in command.get_subcommands().filter(|command| !command.is_hide_set()) {
        commands(below, dir)?;
    }
    let name = command.get_display_name().unwrap_or_else(|| command.get_name());
    let man = page(command);
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    if command.get_subcommands().any(|command| !command.is_hide_set()) {
        man.render_subcommands_section(&mut text)?;
    }
    let others = match name {
        "pavo" => "pavo-config(5), pavo-setup(8)",
        _ => "pavo(1), pavo-config(5)",
    };
    section("SEE ALSO", others).to_writer(&mut text)?;
    write(dir, &man.get_filename(), &formatted(&text))
}

fn page(command: &Command) -> Man {
    let version = command.get_version().unwrap_or_default();
    let command = command.clone().subcommand_value_name("COMMAND");
    let command = command.subcommand_help_heading("COMMANDS");
    Man::new(command).source(format!("pavo {version}")).manual("pavo")
}

fn section(title: &str, text: &str) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", [title]).text([roman(text)]);
    roff
}

/// What administrators run by hand, in one page: too little for one each.
fn setup_page(setup: &Command) -> Result<String> {
    let mut text = Vec::new();
    page(setup).title("pavo-setup").section("8").render_title(&mut text)?;
    let mut roff = Roff::new();
    roff.control("SH", ["NAME"]);
    roff.text([roman("pavo-setup - root's part of clusters on a host of a site")]);
    roff.control("SH", ["SYNOPSIS"]);
    roff.text([bold("pavo internal setup"), roman(" "), roman("COMMAND [OPTION]…")]);
    roff.control("SH", ["DESCRIPTION"]);
    roff.text([roman(
        "For root alone. Slurm's plugin runs `create` and `delete` on the hosts of a job, the \
         units of the package pavo-node run `init` and `sweep`; the others are for \
         administrators.",
    )]);
    roff.control("SH", ["COMMANDS"]);
    for command in setup.get_subcommands().filter(|command| !command.is_hide_set()) {
        roff.control("TP", []);
        let words = command.get_positionals().filter_map(|word| word.get_value_names());
        let words = words.flatten().map(|name| format!(" {name}")).collect::<String>();
        roff.text([bold(command.get_name()), roman(words)]);
        let about = command.get_long_about().or_else(|| command.get_about());
        roff.text([roman(about.map(ToString::to_string).unwrap_or_default())]);
        roff.control("RS", []);
        for option in command.get_arguments().filter(|argument| is_own_option(argument)) {
            let long = format!("--{}", option.get_long().unwrap_or_default());
            let takes = option.get_action().takes_values();
            let value = option.get_value_names().filter(|_| takes).unwrap_or_default();
            let value: String = value.iter().map(|name| format!(" {name}")).collect();
            roff.control("TP", []);
            roff.text([bold(long), roman(value)]);
            roff.text([roman(option.get_help().map(ToString::to_string).unwrap_or_default())]);
        }
        roff.control("RE", []);
    }
    roff.to_writer(&mut text)?;
    section("SEE ALSO", "pavo(1), pavo-config(5)").to_writer(&mut text)?;
    Ok(formatted(&text))
}

/// Not one that all commands have.
fn is_own_option(argument: &Arg) -> bool {
    let common = ["help", "version"].contains(&argument.get_id().as_str());
    !common && !argument.is_positional() && !argument.is_hide_set() && !argument.is_global_set()
}

fn config() -> String {
    let version = env!("CARGO_PKG_VERSION");
    let mut text = CONFIG.replace("VERSION", version);
    for (name, example) in EXAMPLES {
        let lines: String = example.lines().map(|line| verbatim(line) + "\n").collect();
        // From the margin: lines are as wide as a terminal.
        let block = format!(".in 0\n.EX\n{lines}.EE\n.in\n");
        text = text.replace(&format!(".\\\" EXAMPLE {name}\n"), &block);
    }
    formatted(text.as_bytes())
}

/// A line that roff shows as it is.
fn verbatim(line: &str) -> String {
    let line = line.replace('\\', "\\e").replace('-', "\\-").replace('~', "\\(ti");
    let line = line.replace('^', "\\(ha").replace('\'', "\\(aq").replace('`', "\\(ga");
    if line.starts_with(['.', '\'']) { format!("\\&{line}") } else { line }
}

/// What stands between backticks, in bold; words neither stretched nor broken.
fn formatted(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let line = |line: &str| {
        if line.starts_with(".TH ") {
            return line.to_owned() + "\n.ad l\n.nh\n";
        }
        let parts: Vec<&str> = line.split('`').collect();
        let style = |(at, part): (usize, &&str)| {
            if at % 2 == 0 { (*part).to_owned() } else { format!("\\fB{part}\\fR") }
        };
        parts.iter().enumerate().map(style).collect::<String>() + "\n"
    };
    text.lines().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_has_what_it_is_about() {
        let dir = tempfile::tempdir().unwrap();
        write_all(dir.path()).unwrap();
        let page = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        for verb in ["alloc", "batch", "image-import", "template-show"] {
            let page = page(&format!("pavo-{verb}.1"));
            assert!(page.contains("SYNOPSIS") && page.contains("SEE ALSO"), "{page}");
        }
        assert!(!dir.path().join("pavo-internal.1").exists(), "it is not for people");
        let setup = page("pavo-setup.8");
        assert!(setup.contains("\\fBsweep\\fR") && setup.contains("\\fB\\-\\-ids\\fR"), "{setup}");
        let config = page("pavo-config.5");
        for (name, example) in EXAMPLES {
            let last = verbatim(example.lines().last().unwrap());
            assert!(config.contains(&last), "{name}: {last}");
        }
        assert!(!config.contains("EXAMPLE") && !config.contains("VERSION"));
    }

    #[test]
    fn roff_takes_nothing_of_an_example_for_its_own() {
        assert_eq!(verbatim("path: ~/a-b # it's"), "path: \\(ti/a\\-b # it\\(aqs");
        assert_eq!(verbatim(".x `y` \\z"), "\\&.x \\(gay\\(ga \\ez");
        assert_eq!(formatted(b"see `x` and `y-z`."), "see \\fBx\\fR and \\fBy-z\\fR.\n");
    }
}
