//! A site in a folder: its configuration, its daemons, commands that ask them.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use base64ct::{Base64, Encoding};
use serde_json::Value;

/// The longest that anything takes here, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct World {
    pub dir: tempfile::TempDir,
}

/// What a command said.
#[derive(Debug)]
pub struct Run {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl World {
    /// With a store of the daemon's own.
    pub fn new() -> Self {
        let world = Self { dir: tempfile::tempdir().unwrap() };
        world.configure("");
        world
    }

    /// With an etcd.
    pub fn with_etcd(endpoints: &[String]) -> Self {
        let world = Self::new();
        let servers: Vec<&str> =
            endpoints.iter().map(|it| it.trim_start_matches("http://")).collect();
        let text = format!(
            "type: local\nsettings:\n  etcd-servers: [{}]\n  etcd-client-port: 1\n  \
             etcd-protocol: http\n  etcd-auth-type: none\n",
            servers.iter().map(|it| format!("\"{it}\"")).collect::<Vec<_>>().join(", ")
        );
        fs::write(world.path("conf/batch.yaml"), text).unwrap();
        world
    }

    /// Writes daemon.yaml, with more lines.
    pub fn configure(&self, more: &str) {
        fs::create_dir_all(self.path("conf")).unwrap();
        let text = format!(
            "socket: {}\nstate: {}\n{more}",
            self.path("socket").display(),
            self.path("state").display()
        );
        fs::write(self.path("conf/daemon.yaml"), text).unwrap();
    }

    /// Makes the daemon a certificate, `daemon.pem` and `daemon-key.pem`.
    pub fn certify(&self) {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let pem = |what: &str, der: &[u8]| {
            let text = Base64::encode_string(der);
            format!("-----BEGIN {what}-----\n{text}\n-----END {what}-----\n")
        };
        let (chain, key) =
            (pem("CERTIFICATE", certificate.der()), pem("PRIVATE KEY", &key.serialize_der()));
        fs::write(self.path("daemon.pem"), chain).unwrap();
        fs::write(self.path("daemon-key.pem"), key).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pavo"));
        command.args(line.split_whitespace()).env_clear().current_dir(self.dir.path());
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("HOME", self.dir.path()).env("PAVO_STATE_DIR", self.path("own"));
        command.env("PAVO_SYSTEM_CONF_DIR", self.path("conf")).stdin(Stdio::null());
        command
    }

    pub fn run(&self, line: &str) -> Run {
        let output = self.command(line).output().unwrap();
        Run {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    #[track_caller]
    pub fn ok(&self, line: &str) -> String {
        let run = self.run(line);
        assert_eq!(run.code, 0, "{line}: {}{}", run.stdout, run.stderr);
        run.stdout
    }

    #[track_caller]
    pub fn refused(&self, line: &str, code: i32) -> String {
        let run = self.run(line);
        assert_eq!(run.code, code, "{line}: {}{}", run.stdout, run.stderr);
        run.stderr
    }

    /// Starts a daemon; it listens then, and may be active or wait.
    pub fn start(&self) -> Daemon {
        self.start_with(&[])
    }

    pub fn start_with(&self, environment: &[(&str, &str)]) -> Daemon {
        let mut command = self.command("daemon");
        let mut child =
            command.envs(environment.iter().copied()).stderr(Stdio::piped()).spawn().unwrap();
        let said = follow(child.stderr.take().unwrap());
        let mut daemon = Daemon { child: Some(child), said, heard: String::new() };
        daemon.says("listening");
        daemon
    }

    /// A daemon that comes by the moments that [`arm`](Self::arm) says.
    pub fn start_armed(&self) -> Daemon {
        fs::create_dir_all(self.path("crash")).unwrap();
        let dir = self.path("crash");
        self.start_with(&[("PAVO_CRASH_DIR", dir.to_str().unwrap())])
    }

    /// Lets a daemon be killed when it next comes by this moment.
    pub fn arm(&self, point: &str) {
        use std::os::unix::fs::PermissionsExt;
        fs::create_dir_all(self.path("crash")).unwrap();
        let (aside, file) = (self.path("crash/aside"), self.path("crash/crash-at"));
        fs::write(&aside, format!("{point} kill\n")).unwrap();
        fs::set_permissions(&aside, fs::Permissions::from_mode(0o600)).unwrap();
        fs::rename(aside, file).unwrap();
    }

    /// A daemon that is active.
    pub fn active(&self) -> Daemon {
        let mut daemon = self.start();
        daemon.says(" active ");
        daemon
    }

    /// Asks the daemon as any program might.
    pub fn ask(&self, method: &str, path: &str, body: Option<(&str, &str)>) -> (u16, Value) {
        let (status, _, body) = ask(&self.path("socket"), method, path, body);
        (status, serde_json::from_str(&body).unwrap_or(Value::String(body)))
    }
}

/// One request at a socket: status, head, body.
pub fn ask(
    socket: &Path,
    method: &str,
    path: &str,
    body: Option<(&str, &str)>,
) -> (u16, String, String) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n");
    if let Some((kind, body)) = body {
        request += &format!("content-type: {kind}\r\ncontent-length: {}\r\n", body.len());
    }
    request += "\r\n";
    request += body.map_or("", |(_, body)| body);
    // An answer may come before all was said.
    let _ = stream.write_all(request.as_bytes());
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|it| it.parse().ok()).unwrap_or(0);
    (status, head.to_lowercase(), body.to_owned())
}

fn follow(stderr: ChildStderr) -> Receiver<String> {
    let (send, receive) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines() {
            let Ok(line) = line else { break };
            // The test may have ended.
            let _ = send.send(line);
        }
    });
    receive
}

/// A daemon, ended with this value.
pub struct Daemon {
    child: Option<Child>,
    said: Receiver<String>,
    pub heard: String,
}

impl Daemon {
    /// Waits until it has said that.
    #[track_caller]
    pub fn says(&mut self, what: &str) {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            let left = end.saturating_duration_since(Instant::now());
            let Ok(line) = self.said.recv_timeout(left) else { break };
            self.heard += &line;
            self.heard.push('\n');
            if line.contains(what) || format!("{line} ").contains(what) {
                return;
            }
        }
        panic!("it never says `{what}`, but:\n{}", self.heard);
    }

    pub fn pid(&self) -> i32 {
        let id = self.child.as_ref().map_or(0, |child| child.id());
        i32::try_from(id).unwrap()
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Ends it as systemd would; its exit code.
    pub fn stop(mut self) -> i32 {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        let status = self.child.take().unwrap().wait().unwrap();
        status.code().unwrap_or(-1)
    }

    /// Waits until it was killed, by itself.
    #[track_caller]
    pub fn dies(mut self) {
        use std::os::unix::process::ExitStatusExt;
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                self.child = None;
                assert_eq!(status.signal(), Some(9), "{status}");
                return;
            }
            assert!(Instant::now() < end, "it does not die");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends it at once.
    pub fn kill(mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
