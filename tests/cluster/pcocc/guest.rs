//! The guest's end of pcocc's agent protocol, for tests: it runs commands as that agent does.
//! Built by the test with the compiler alone, and static, so that it runs in any guest.
//!
//! What matters about the other one: a thread for each request, so that answers come in any
//! order; output is read only while somebody is attached, and is sent without asking; the end of
//! a command is told once both its streams have ended; on a terminal their end is an error,
//! told again and again; SIGKILL to the process is the only signal.

use std::collections::HashMap;
use std::ffi::c_int;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{sleep, spawn};
use std::time::Duration;

const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn encode(bytes: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    for three in bytes.chunks(3) {
        let all = three.iter().enumerate().map(|(at, byte)| u32::from(*byte) << (16 - 8 * at));
        let all: u32 = all.sum();
        for at in 0..4 {
            let letter = LETTERS[(all >> (18 - 6 * at)) as usize & 63];
            text.push(if at <= three.len() { letter } else { b'=' });
        }
    }
    text
}

fn decode(text: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    if text.len() % 4 != 0 {
        return None;
    }
    for four in text.chunks(4) {
        let (mut all, mut count) = (0, 0);
        for letter in four {
            let number = LETTERS.iter().position(|known| known == letter);
            count += usize::from(*letter != b'=');
            all = all << 6 | number.or((*letter == b'=').then_some(0))?;
        }
        bytes.extend(&[(all >> 16) as u8, (all >> 8) as u8, all as u8][..count.checked_sub(1)?]);
    }
    Some(bytes)
}

/// Numbers are what they are, texts are bytes, in the order in which they came.
#[derive(Clone, Debug, Default)]
struct Fields(Vec<(u64, u64, Vec<u8>)>);

impl Fields {
    fn read(mut bytes: &[u8]) -> Option<Self> {
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let head = varint(&mut bytes)?;
            let number = varint(&mut bytes)?;
            let mut text = Vec::new();
            match head & 7 {
                0 => {}
                2 => {
                    text = bytes.get(..number as usize)?.to_vec();
                    bytes = &bytes[number as usize..];
                }
                _ => return None,
            }
            all.push((head >> 3, number, text));
        }
        Some(Self(all))
    }

    fn number(&self, field: u64) -> i64 {
        self.0.iter().filter(|it| it.0 == field).map(|it| it.1 as i64).last().unwrap_or(0)
    }

    fn bytes(&self, field: u64) -> Vec<u8> {
        self.0.iter().filter(|it| it.0 == field).map(|it| it.2.clone()).last().unwrap_or_default()
    }

    fn text(&self, field: u64) -> String {
        String::from_utf8(self.bytes(field)).unwrap()
    }

    fn texts(&self, field: u64) -> Vec<String> {
        let all = self.0.iter().filter(|it| it.0 == field);
        all.map(|it| String::from_utf8(it.2.clone()).unwrap()).collect()
    }
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn put_varint(bytes: &mut Vec<u8>, mut number: u64) {
    while number > 127 {
        bytes.push(number as u8 | 128);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn number(field: u64, number: i64) -> Vec<u8> {
    let mut bytes = Vec::new();
    if number != 0 {
        put_varint(&mut bytes, field << 3);
        put_varint(&mut bytes, number as u64);
    }
    bytes
}

fn text(field: u64, text: impl AsRef<[u8]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_varint(&mut bytes, field << 3 | 2);
    put_varint(&mut bytes, text.as_ref().len() as u64);
    bytes.extend(text.as_ref());
    bytes
}

const REPLY: i64 = 1;
const STREAM_REPLY: i64 = 4;

/// The answer's type and what is in it.
type Answer = Result<(&'static str, Vec<u8>), String>;

#[derive(Clone)]
struct Port(Arc<Mutex<File>>);

impl Port {
    fn say(&self, kind: i64, name: &str, tag: i64, answer: Answer) {
        let (of, data) = match answer {
            Ok(answer) => answer,
            Err(why) => ("GenericError", [number(1, 5), text(2, why)].concat()),
        };
        let any = [text(1, format!("type.googleapis.com/{of}")), text(2, data)].concat();
        let message = [number(1, kind), text(2, name), number(3, tag), text(4, any)].concat();
        let mut line = encode(&message);
        line.push(b'\n');
        self.0.lock().unwrap().write_all(&line).unwrap();
    }
}

/// A command.
struct Exec {
    child: Mutex<Child>,
    input: Mutex<Option<File>>,
    terminal: Option<File>,
    filename: String,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    attached: Option<i64>,
    ends: u32,
}

#[derive(Clone)]
struct Agent {
    port: Port,
    execs: Arc<Mutex<HashMap<i64, Arc<Exec>>>>,
}

impl Agent {
    fn serve(&self, mut port: File) {
        let (mut bytes, mut line) = (vec![0; 4096], Vec::new());
        loop {
            let count = match port.read(&mut bytes) {
                Ok(0) | Err(_) => return,
                Ok(count) => count,
            };
            for byte in &bytes[..count] {
                if *byte != b'\n' {
                    line.push(*byte);
                    continue;
                }
                let message = decode(&std::mem::take(&mut line)).and_then(|it| Fields::read(&it));
                if let Some(message) = message {
                    let agent = self.clone();
                    spawn(move || agent.take(&message));
                }
            }
        }
    }

    fn take(&self, message: &Fields) {
        let (name, tag) = (message.text(2), message.number(3));
        let data = Fields::read(&Fields::read(&message.bytes(4)).unwrap().bytes(2)).unwrap();
        match (message.number(1), &*name) {
            (0, _) => self.port.say(REPLY, &name, tag, self.answer(&name, &data)),
            (3, "attach") => match self.find(&data) {
                Ok(exec) => {
                    let mut state = exec.state.lock().unwrap();
                    if let Some(other) = state.attached.replace(tag) {
                        self.port.say(REPLY, "attach", other, Ok(("DetachResult", vec![])));
                    }
                    self.port.say(STREAM_REPLY, "attach", tag, Ok(("AttachResult", vec![])));
                    exec.changed.notify_all();
                }
                Err(why) => self.port.say(REPLY, &name, tag, Err(why)),
            },
            _ => {}
        }
    }

    fn find(&self, data: &Fields) -> Result<Arc<Exec>, String> {
        let execs = self.execs.lock().unwrap();
        execs.get(&data.number(2)).cloned().ok_or_else(|| "No current exec with this id".into())
    }

    fn answer(&self, name: &str, data: &Fields) -> Answer {
        let error = |error: std::io::Error| error.to_string();
        match name {
            "hello" => Ok(("HelloResult", [number(1, 1_700_000_000), number(2, 1)].concat())),
            "hostname" => {
                let name = fs::read_to_string("/proc/sys/kernel/hostname").map_err(error)?;
                Ok(("HostnameResult", text(1, name.trim())))
            }
            "corecount" => Ok(("CoreCountResult", number(1, 1))),
            "userinfo" => {
                let (_, uid, gid, home) = account(&data.text(1))?;
                let numbers = [number(4, uid.into()), number(5, gid.into())].concat();
                Ok(("UserInfoResult", [text(1, data.bytes(1)), text(3, home), numbers].concat()))
            }
            "execve" => self.begin(data).map(|()| ("ExecResult", vec![])),
            "stdin" => {
                let exec = self.find(&Fields(vec![(2, data.number(4) as u64, vec![])]))?;
                let mut input = exec.input.lock().unwrap();
                let mut file = input.as_ref().ok_or("file already closed")?;
                let written = file.write_all(&data.bytes(3)).map_err(error);
                if data.number(2) != 0 {
                    *input = None;
                }
                written.map(|()| ("IOResult", vec![]))
            }
            "resize" => {
                let exec = self.find(&Fields(vec![(2, data.number(4) as u64, vec![])]))?;
                if let Some(terminal) = &exec.terminal {
                    let size = [data.number(5) as u16, data.number(6) as u16, 0, 0];
                    unsafe { ioctl(terminal.as_raw_fd(), 0x5414, &size) };
                }
                Ok(("IOResult", vec![]))
            }
            "detach" => {
                let exec = self.find(data)?;
                let mut state = exec.state.lock().unwrap();
                if let Some(tag) = state.attached.take_if(|tag| *tag == data.number(3)) {
                    self.port.say(REPLY, "attach", tag, Ok(("DetachResult", vec![])));
                }
                Ok(("DetachResult", vec![]))
            }
            "kill" => {
                self.find(data)?.child.lock().unwrap().kill().map_err(error)?;
                Ok(("KillResult", vec![]))
            }
            "listexec" => {
                let execs = self.execs.lock().unwrap();
                let entry = |(id, exec): (&i64, &Arc<Exec>)| {
                    text(1, [number(1, *id), text(2, text(1, &exec.filename))].concat())
                };
                Ok(("ListExecResult", execs.iter().flat_map(entry).collect()))
            }
            "execoutput" => {
                let ran = Command::new(data.text(1)).args(data.texts(2)).output();
                let ran = ran.map_err(error)?;
                let code = number(1, ran.status.code().unwrap_or(-1).into());
                Ok(("ExecOutputResult", [code, text(3, ran.stdout)].concat()))
            }
            "writefile" => {
                let mut options = OpenOptions::new();
                let append = data.number(3) != 0;
                options.append(append).truncate(!append).write(true).create(true);
                let file = options.mode(data.number(4) as u32).open(data.text(1));
                file.and_then(|mut file| file.write_all(&data.bytes(2))).map_err(error)?;
                Ok(("WriteFileResult", number(1, data.bytes(2).len() as i64)))
            }
            "remove" => {
                fs::remove_file(data.text(1)).map_err(error)?;
                Ok(("RemoveResult", vec![]))
            }
            name => Err(format!("Unknown message name: {name}")),
        }
    }

    fn begin(&self, data: &Fields) -> Result<(), String> {
        let mut execs = self.execs.lock().unwrap();
        let id = data.number(1);
        if execs.contains_key(&id) {
            return Err("Unable to register exec: id already in use".into());
        }
        let filename = data.text(2);
        let mut command = Command::new(&filename);
        command.args(data.texts(3));
        let user = Some(data.text(5)).filter(|user| !user.is_empty());
        let (_, uid, gid, _) = account(&user.unwrap_or_else(|| "root".into()))?;
        command.uid(uid).gid(gid);
        let env = data.texts(4);
        if !env.is_empty() {
            command.env_clear().envs(env.iter().filter_map(|word| word.split_once('=')));
        }
        let error = |error: std::io::Error| error.to_string();
        let (child, input, outputs, terminal);
        if data.number(7) != 0 {
            let (ours, theirs) = open_terminal();
            let again = || Stdio::from(theirs.try_clone().unwrap());
            command.stdin(again()).stdout(again()).stderr(again());
            unsafe { command.pre_exec(lead_terminal) };
            child = command.spawn().map_err(error)?;
            drop(command);
            drop(theirs);
            terminal = Some(ours.try_clone().unwrap());
            input = Some(ours.try_clone().unwrap());
            outputs = vec![(1, ours)];
        } else {
            command.process_group(0);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut begun = command.spawn().map_err(error)?;
            let file = |fd: std::os::fd::OwnedFd| File::from(fd);
            input = begun.stdin.take().map(|it| file(it.into()));
            let output = file(begun.stdout.take().unwrap().into());
            outputs = vec![(1, output), (2, file(begun.stderr.take().unwrap().into()))];
            (child, terminal) = (begun, None);
        }
        let exec = Arc::new(Exec {
            child: Mutex::new(child),
            input: Mutex::new(input),
            terminal,
            filename,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        execs.insert(id, exec.clone());
        for (kind, file) in outputs {
            let (agent, exec) = (self.clone(), exec.clone());
            spawn(move || agent.show(id, &exec, kind, file));
        }
        Ok(())
    }

    /// Shows one of a command's streams to who is attached, and at the end of all its end.
    fn show(&self, id: i64, exec: &Exec, kind: i64, mut file: File) {
        let mut bytes = vec![0; 32768];
        loop {
            let count = file.read(&mut bytes).unwrap_or(0);
            let mut state = exec.state.lock().unwrap();
            while state.attached.is_none() {
                state = exec.changed.wait(state).unwrap();
            }
            let tag = state.attached.unwrap();
            let piece = [number(1, kind), number(2, i64::from(count == 0)), text(3, &bytes[..count])];
            self.port.say(STREAM_REPLY, "attach", tag, Ok(("IOMessage", piece.concat())));
            if count > 0 {
                continue;
            }
            state.ends += 1;
            if state.ends < 2 && exec.terminal.is_some() {
                continue;
            }
            if state.ends < 2 {
                return;
            }
            drop(state);
            let status = exec.child.lock().unwrap().wait().unwrap().code().unwrap_or(-1);
            self.execs.lock().unwrap().remove(&id);
            let mut state = exec.state.lock().unwrap();
            while state.attached.is_none() {
                state = exec.changed.wait(state).unwrap();
            }
            let tag = state.attached.take().unwrap();
            let status = number(1, status.into());
            self.port.say(REPLY, "attach", tag, Ok(("ExitStatus", status)));
            return;
        }
    }
}

/// A user's name, numbers and home.
fn account(name: &str) -> Result<(String, u32, u32, String), String> {
    let all = fs::read_to_string("/etc/passwd").map_err(|error| error.to_string())?;
    for line in all.lines() {
        let parts: Vec<&str> = line.split(':').collect();
        if parts[0] == name {
            let numbers = [parts[2], parts[3]].map(|number| number.parse().unwrap());
            return Ok((name.into(), numbers[0], numbers[1], parts[5].into()));
        }
    }
    Err(format!("user: unknown user {name}"))
}

unsafe extern "C" {
    fn posix_openpt(flags: c_int) -> c_int;
    fn grantpt(fd: c_int) -> c_int;
    fn unlockpt(fd: c_int) -> c_int;
    fn setsid() -> c_int;
    fn ioctl(fd: c_int, request: u64, ...) -> c_int;
}

/// Both ends of a terminal.
fn open_terminal() -> (File, File) {
    let (mut number, flags) = (0, 0o2 | 0o400 | 0o2_000_000);
    let ours = unsafe { posix_openpt(flags) };
    assert!(ours >= 0);
    unsafe { (grantpt(ours), unlockpt(ours), ioctl(ours, 0x8004_5430, &mut number as *mut c_int)) };
    let mut options = OpenOptions::new();
    let theirs = options.read(true).write(true).custom_flags(0o400);
    let theirs = theirs.open(format!("/dev/pts/{number}")).unwrap();
    (unsafe { File::from_raw_fd(ours) }, theirs)
}

/// Makes a command the first of a session with its terminal.
fn lead_terminal() -> std::io::Result<()> {
    unsafe { (setsid(), ioctl(0, 0x540e, 0)) };
    Ok(())
}

fn main() {
    loop {
        let ports = fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten();
        let is_ours = |path: &std::path::Path| {
            fs::read_to_string(path.join("name")).is_ok_and(|name| name == "pcocc_agent\n")
        };
        let found = ports.map(|port| port.path()).find(|path| is_ours(path));
        let Some(path) = found else {
            sleep(Duration::from_millis(100));
            continue;
        };
        let device = std::path::Path::new("/dev").join(path.file_name().unwrap());
        let Ok(mut port) = OpenOptions::new().read(true).write(true).open(device) else {
            sleep(Duration::from_secs(1));
            continue;
        };
        port.write_all(b"\n").unwrap();
        let write = Port(Arc::new(Mutex::new(port.try_clone().unwrap())));
        Agent { port: write, execs: Arc::default() }.serve(port);
    }
}
