//! A cluster on this machine, for people: `make lab`.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "it talks to people")]

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use pavo_lab::{Error, Etcd, Lab, Options, Result, build_tiny, people};

const HELP: &str = "\
A cluster on this machine: Slurm, etcd and Open vSwitch on hosts in namespaces.

  pavo-lab shell [HOST] [OPTIONS]   a shell on a host; the lab goes when you leave it
  pavo-lab run [OPTIONS] -- COMMAND the same with a command
  pavo-lab up [OPTIONS]             a lab without a shell, until Ctrl-C
  pavo-lab down                     takes open labs down, removes what killed ones left

`shell` and `run` enter the lab that is open in another terminal, if there is one.

  --new           not that one: a lab of its own
  --host HOST     login, n1, n2, …, e1, … (default: login)
  --user USER     alice, bob or root (default: alice)
  --hosts N       compute hosts (default: 2)
  --etcd N        members of the store: 0, 1 or 3 (default: 3)
  --no-ovs        no Open vSwitch
  --no-pavo       neither of the next two
  --pavo FILE     /usr/bin/pavo of the hosts (default: the one beside this program)
  --plugin FILE   Slurm's plugin (default: libspank_pavo.so beside this program)
";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match ask(&words).and_then(|ask| answer(&ask)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The command line.
struct Ask {
    verb: String,
    host: String,
    user: String,
    new: bool,
    options: Options,
    command: Vec<String>,
}

impl Ask {
    /// Whether all is there that a cluster needs.
    fn is_whole(&self) -> bool {
        let Options { pavo, plugin, etcd, .. } = &self.options;
        pavo.is_some() && plugin.is_some() && *etcd != Etcd::None
    }
}

fn ask(words: &[String]) -> Result<Ask> {
    let beside = |name| {
        let dir = std::env::current_exe().ok()?.parent()?.to_owned();
        Some(dir.join(name)).filter(|path| path.exists())
    };
    let options = Options {
        hosts: 2,
        etcd: Etcd::Three,
        ovs: true,
        pavo: beside("pavo"),
        plugin: beside("libspank_pavo.so"),
        ..Options::default()
    };
    let mut words = words.iter().cloned();
    let verb = words.next().unwrap_or_else(|| "help".into());
    let (host, user) = ("login".into(), "alice".into());
    let mut ask = Ask { verb, host, user, new: false, options, command: Vec::new() };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| Error::new(format!("{word} what?")));
        let wrong = |value| Error::new(format!("{word} {value}: see `pavo-lab help`"));
        match word.as_str() {
            "--new" => ask.new = true,
            "--host" => ask.host = value()?,
            "-u" | "--user" => ask.user = value()?,
            "--hosts" => ask.options.hosts = value()?.parse().map_err(|_| wrong("?"))?,
            "--etcd" => {
                ask.options.etcd = match value()?.as_str() {
                    "0" => Etcd::None,
                    "1" => Etcd::One,
                    "3" => Etcd::Three,
                    other => return Err(wrong(other)),
                }
            }
            "--no-pavo" => (ask.options.pavo, ask.options.plugin) = (None, None),
            "--no-ovs" => ask.options.ovs = false,
            "--pavo" => ask.options.pavo = Some(PathBuf::from(value()?)),
            "--plugin" => ask.options.plugin = Some(PathBuf::from(value()?)),
            "--" => ask.command = words.by_ref().collect(),
            host if ask.verb == "shell" && !host.starts_with('-') => ask.host = host.into(),
            other => return Err(Error::new(format!("{other}? see `pavo-lab help`"))),
        }
    }
    Ok(ask)
}

fn answer(ask: &Ask) -> Result<ExitCode> {
    let shell = ["bash".to_owned(), "-l".to_owned()];
    match ask.verb.as_str() {
        "up" => up(ask),
        "shell" => within(ask, &shell),
        "run" if ask.command.is_empty() => Err(Error::new("run what? `pavo-lab run -- COMMAND`")),
        "run" => within(ask, &ask.command),
        "down" => down(),
        "help" | "-h" | "--help" => {
            print!("{HELP}");
            Ok(ExitCode::SUCCESS)
        }
        other => Err(Error::new(format!("{other}? see `pavo-lab help`"))),
    }
}

fn down() -> Result<ExitCode> {
    for lab in people::open() {
        println!("Taking {} down.", lab.prefix());
        lab.end()?;
    }
    pavo_lab::sweep();
    Ok(ExitCode::SUCCESS)
}

fn up(ask: &Ask) -> Result<ExitCode> {
    let signals = signals()?;
    let lab = bring_up(ask)?;
    println!("{}", text(&lab, ask));
    println!("Ctrl-C takes it all away.");
    // Any of them ends it.
    let _ = signals.recv();
    Ok(ExitCode::SUCCESS)
}

/// Runs `argv` in the lab that is open, or in one that lives as long as it runs.
fn within(ask: &Ask, argv: &[String]) -> Result<ExitCode> {
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let user = Some(ask.user.as_str());
    if let Some(open) = people::open().first().filter(|_| !ask.new) {
        return Err(terminal(open.command(&ask.host, user, &argv)?).exec().into());
    }
    let signals = signals()?;
    let lab = bring_up(ask)?;
    if ask.verb == "shell" {
        println!("{}", text(&lab, ask));
        let host = lab.host(&ask.host).name();
        println!("You are {} on {host}. Leaving this shell takes all of it away.", ask.user);
    }
    let mut child = terminal(lab.host(&ask.host).command(user, &argv)?).spawn()?;
    let status = attend(&mut child, &signals)?;
    if ask.verb == "shell" {
        return Ok(ExitCode::SUCCESS);
    }
    let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

fn bring_up(ask: &Ask) -> Result<Lab> {
    let Some(pavo) = ask.options.pavo.as_ref().filter(|_| ask.is_whole()) else {
        let lab = Lab::up(ask.options.clone())?;
        people::offer(&lab)?;
        return Ok(lab);
    };
    let exe = std::env::current_exe()?;
    let target = exe.parent().unwrap_or(&exe);
    eprintln!("The image `tiny`…");
    let images = build_tiny(pavo, &target.join("lab-images"), &target.join("lab-packages"))?;
    eprintln!("Hosts, Slurm, etcd…");
    let lab = Lab::up(Options { client_certs: true, ..ask.options.clone() })?;
    lab.ready(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../etc"), &images)?;
    people::offer(&lab)?;
    Ok(lab)
}

/// With what the program should know of the terminal.
fn terminal(mut command: Command) -> Command {
    for name in ["TERM", "COLORTERM", "NO_COLOR"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command
}

/// Signals that end a lab arrive on a channel: it is taken down, not left behind.
fn signals() -> Result<Receiver<Signal>> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        set.add(signal);
    }
    set.thread_block()?;
    let (send, receive) = channel();
    std::thread::spawn(move || {
        while let Ok(signal) = set.wait() {
            if send.send(signal).is_err() {
                return;
            }
        }
    });
    Ok(receive)
}

/// Waits for the child, which a request to end the lab ends, too.
fn attend(child: &mut Child, signals: &Receiver<Signal>) -> Result<ExitStatus> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        match signals.recv_timeout(Duration::from_millis(30)) {
            // Those of the terminal are for the child, which has got them.
            Ok(Signal::SIGINT | Signal::SIGQUIT) | Err(RecvTimeoutError::Timeout) => {}
            // A shell that is hung up leaves the terminal in order.
            Ok(_) | Err(RecvTimeoutError::Disconnected) => {
                let pid = i32::try_from(child.id()).map_err(|_| Error::new("a strange pid"))?;
                kill(Pid::from_raw(pid), Signal::SIGHUP)?;
                for _ in 0..100 {
                    if let Some(status) = child.try_wait()? {
                        return Ok(status);
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                child.kill()?;
            }
        }
    }
}

fn text(lab: &Lab, ask: &Ask) -> String {
    let names = |hosts: Vec<&str>| hosts.join(" ");
    let computes = names(lab.computes().map(|host| host.name()).collect());
    let mut text = format!(
        "This machine now has a cluster in it.\n\
         Hosts: {} (login), {computes} (compute). People: alice, bob.\n",
        lab.login().name()
    );
    if let Some(store) = lab.store() {
        text += &format!("etcd: {}\n", store.endpoints.join(" "));
    }
    let count = lab.computes().count();
    text += &format!(
        "Try, as alice on the login host:\n\
         \x20 sinfo                        the nodes\n\
         \x20 srun -N{count} hostname            a job on all of them\n"
    );
    if ask.is_whole() {
        text += &tutorial(count);
    }
    let program = std::env::current_exe().unwrap_or_else(|_| "pavo-lab".into());
    let program = program.display();
    text + &format!(
        "In another terminal, as root:\n\
         \x20 {program} shell n1 --user root   a shell on that host\n\
         \x20 {program} down                   takes all of it away"
    )
}

/// A first cluster, step by step. `tests/slurm/tutorial.rs` takes these steps.
fn tutorial(count: usize) -> String {
    let hosts = match count {
        1 => "",
        _ => "-N2 ",
    };
    format!(
        "A cluster of virtual machines:\n\
         \x20 mkdir -p ~/.pavo\n\
         \x20 printf 'mine:\\n  image: tiny\\n  description: my own\\n' >~/.pavo/templates.yaml\n\
         \x20 pavo template list           it is there, and so is `tiny`\n\
         \x20 pavo alloc -c1 {hosts}--wait ssh mine:4\n\
         \x20   pavo status                where each of them is\n\
         \x20   pavo ssh vm0 ping -c1 vm3  by name, from host to host\n\
         \x20   pavo console vm3           leave it with three times Ctrl-C\n\
         \x20   exit                       ends the cluster\n\
         \x20 pavo batch -c1 {hosts}-E 'pavo status' mine:2; cat slurm-*.out\n\
         \x20 pavo batch -c1 {hosts}mine:2        stays until it is cancelled\n\
         \x20 pavo ps; pavo ssh -J pavo vm0; scancel -n pavo\n"
    )
}
