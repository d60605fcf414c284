//! Both ends over a pair of sockets; and ends that lie.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

/// A folder that goes with its test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static LAST: AtomicU32 = AtomicU32::new(0);
        let number = LAST.fetch_add(1, Ordering::Relaxed);
        let name = format!("pavo-agent-copy-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|error| format!("{name}: {error}"))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// How both ends of a copy ended, and what was seen at each.
struct Ended {
    sent: Result<(), Stop>,
    received: Result<(), Stop>,
    sender: Vec<Seen>,
    receiver: Vec<Seen>,
}

impl Ended {
    #[track_caller]
    fn well(self) -> Self {
        assert_eq!((&self.sent, &self.received), (&Ok(()), &Ok(())));
        self
    }

    fn bytes(&self) -> u64 {
        let more = |seen: &Seen| if let Seen::Bytes(more) = seen { *more } else { 0 };
        self.receiver.iter().map(more).sum()
    }

    fn troubles(&self) -> Vec<&str> {
        let seen = self.receiver.iter();
        seen.filter_map(|seen| if let Seen::Trouble(why) = seen { Some(&**why) } else { None })
            .collect()
    }
}

fn place(path: impl Into<PathBuf>) -> Place {
    Place { path: path.into(), into: false, names: None }
}

fn copy(sources: &[&Path], place: &Place) -> Ended {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let sources: Vec<PathBuf> = sources.iter().map(|path| path.to_path_buf()).collect();
    let (sent, sender) = (
        Vec::new(),
        std::thread::spawn(move || {
            let mut seen = Vec::new();
            let end = &ours;
            let sent = send(end, end, &sources, &mut |what| seen.push(what));
            ours.shutdown(Shutdown::Both).ok();
            (sent, seen)
        }),
    );
    let mut receiver: Vec<Seen> = sent;
    let received = receive(&theirs, &theirs, place, &mut |what| receiver.push(what));
    theirs.shutdown(Shutdown::Both).ok();
    let (sent, sender) = sender.join().unwrap();
    Ended { sent, received, sender, receiver }
}

/// A sender that says this, whatever it hears.
fn said(records: &[Record<'_>], place: &Place) -> Result<(), Stop> {
    let mut bytes = Vec::new();
    records.iter().for_each(|record| record.write(&mut bytes).unwrap());
    receive(&*bytes, std::io::sink(), place, &mut drop)
}

fn entry(name: &str, size: u64) -> Entry {
    Entry { name: name.into(), mode: 0o644, size, ..Entry::default() }
}

fn noise(count: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let step = |state: &mut u64| {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (*state >> 40) as u8
    };
    (0..count).map(|_| step(&mut state)).collect()
}

fn list(path: &Path) -> Vec<String> {
    let names = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_tree_arrives_with_modes_times_links_and_holes() {
    let folder = Folder::new();
    folder.write("from/a/b/deep", noise(3_000_000));
    folder.write("from/empty", "");
    folder.write("from/program", "#!").metadata().unwrap();
    fs::set_permissions(folder.path("from/program"), Permissions::from_mode(0o4751)).unwrap();
    fs::set_permissions(folder.path("from/a/b"), Permissions::from_mode(0o550)).unwrap();
    symlink("../../etc/passwd", folder.path("from/link")).unwrap();
    symlink("a", folder.path("from/inner")).unwrap();
    let sparse = File::create(folder.path("from/sparse")).unwrap();
    sparse.set_len(1 << 30).unwrap();
    sparse.write_all_at(b"middle", 300 << 20).unwrap();
    let time = nix::sys::time::TimeSpec::new(1_000_000_000, 123_456_789);
    for name in ["from/program", "from/a/b", "from/sparse"] {
        let file = File::open(folder.path(name)).unwrap();
        nix::sys::stat::futimens(&file, &time, &time).unwrap();
    }
    let from = folder.path("from");
    let ended = copy(&[&from], &place(folder.path("to"))).well();
    assert_eq!(ended.sender[0], Seen::Total(3_000_000 + 2 + (1 << 30)));
    assert_eq!((ended.bytes(), ended.troubles().len()), (3_000_002 + (1 << 30), 0));
    assert!(fs::read(folder.path("to/a/b/deep")).unwrap() == noise(3_000_000));
    assert_eq!(list(&folder.path("to")), list(&from));
    let about = |name: &str| fs::symlink_metadata(folder.path(name)).unwrap();
    assert_eq!(about("to/program").mode() & 0o7777, 0o751, "whom it runs as does not travel");
    assert_eq!(about("to/a/b").mode() & 0o7777, 0o550);
    for name in ["to/program", "to/a/b", "to/sparse"] {
        let about = about(name);
        assert_eq!((about.mtime(), about.mtime_nsec()), (1_000_000_000, 123_456_789), "{name}");
    }
    let target = |name: &str| fs::read_link(folder.path(name)).unwrap();
    assert_eq!(target("to/link"), Path::new("../../etc/passwd"));
    assert_eq!(target("to/inner"), Path::new("a"));
    let sparse = about("to/sparse");
    assert_eq!(sparse.len(), 1 << 30);
    assert!(sparse.blocks() * 512 < 1 << 20, "{} blocks", sparse.blocks());
    let mut middle = [0; 8];
    File::open(folder.path("to/sparse")).unwrap().read_at(&mut middle, 300 << 20).unwrap();
    assert_eq!(&middle, b"middle\0\0");
    // Again, over what is there: also a folder that was closed. Folders stay what they are,
    // but for one that an interrupted copy has made.
    fs::write(folder.path("to/a/b/deep"), "other").unwrap();
    fs::set_permissions(folder.path("to"), Permissions::from_mode(0o1777)).unwrap();
    fs::set_permissions(folder.path("to/a"), Permissions::from_mode(0o1700)).unwrap();
    copy(&[&from.join(".")], &place(folder.path("to"))).well();
    assert_eq!(about("to").mode() & 0o7777, 0o1777);
    assert_eq!(about("to/a").mode() & 0o7777, about("from/a").mode() & 0o7777);
    assert_eq!(about("to/a/b").mode() & 0o7777, 0o550);
    assert!(fs::read(folder.path("to/a/b/deep")).unwrap() == noise(3_000_000));
    for name in ["from/a/b", "to/a/b"] {
        fs::set_permissions(folder.path(name), Permissions::from_mode(0o755)).unwrap();
    }
}

#[test]
fn what_it_is_called_there_is_as_cp_would() {
    let folder = Folder::new();
    let (file, tree) = (folder.write("file", "x"), folder.write("tree/leaf", "y"));
    let tree = tree.parent().unwrap();
    fs::create_dir(folder.path("there")).unwrap();
    let to = |name: &str| place(folder.path(name));
    copy(&[&file], &to("new")).well();
    assert_eq!(folder.read("new"), "x");
    copy(&[&file, tree], &to("there")).well();
    assert_eq!(
        (folder.read("there/file"), folder.read("there/tree/leaf")),
        ("x".into(), "y".into())
    );
    copy(&[tree], &to("made")).well();
    assert_eq!(folder.read("made/leaf"), "y");
    copy(&[&tree.join(".")], &to("there")).well();
    assert_eq!(folder.read("there/leaf"), "y");
    let into = Place { into: true, ..to("d1/d2") };
    copy(&[&file], &into).well();
    assert_eq!(folder.read("d1/d2/file"), "x");
    symlink(&file, folder.path("link")).unwrap();
    copy(&[&folder.path("link")], &to("there")).well();
    assert!(fs::symlink_metadata(folder.path("there/link")).unwrap().is_file());
    // What cannot be.
    for (sources, to, why) in [
        (vec![&*file], to("no/such"), "No such file"),
        (vec![&*file], Place { into: true, ..to("file") }, "Not a directory"),
        (vec![tree], to("new"), "is there already, and is no folder"),
    ] {
        let ended = copy(&sources, &to);
        let (Err(Stop::Own(ours)), Err(Stop::Told(told))) = (ended.received, ended.sent) else {
            panic!("{why}")
        };
        assert!(ours.contains(why) && told == ours, "{ours} / {told}");
    }
    fs::create_dir(folder.path("there2")).unwrap();
    fs::create_dir(folder.path("there2/file")).unwrap();
    let ended = copy(&[&file], &to("there2"));
    assert!(matches!(ended.received, Err(Stop::Own(why)) if why.contains("is a folder")));
    assert_eq!(list(&folder.path("there2")), ["file"], "and no part is left");
}

#[test]
fn what_cannot_be_read_is_told_and_the_rest_sent() {
    let folder = Folder::new();
    folder.write("from/good", "x");
    nix::unistd::mkfifo(&folder.path("from/pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let ended = copy(
        &[&folder.path("missing"), &folder.path("from")],
        &Place {
            into: true,
            names: Some(vec![b"missing".into(), b"from".into()]),
            ..place(folder.path("to"))
        },
    );
    let ended = ended.well();
    let troubles = ended.troubles();
    assert_eq!(troubles.len(), 2, "{troubles:?}");
    assert!(troubles[0].ends_with("missing`: No such file or directory"), "{troubles:?}");
    assert!(troubles[1].contains("pipe`: neither a file"), "{troubles:?}");
    assert_eq!(folder.read("to/from/good"), "x");
    // Files that do not tell their size.
    copy(&[Path::new("/proc/version")], &place(folder.path("version"))).well();
    assert!(folder.read("version").starts_with("Linux version"));
}

#[test]
fn an_interrupted_copy_is_gone_on_with_and_no_more_is_believed_than_is_so() {
    let folder = Folder::new();
    let bytes = noise(5_000_000);
    let from = folder.write("big", &bytes);
    let part = folder.path("to/.big.pavo-part");
    fs::create_dir(folder.path("to")).unwrap();
    let to = place(folder.path("to"));
    let begin = || fs::read(&from).unwrap();
    // An interrupted one leaves its part.
    let size = bytes.len() as u64;
    let big = Entry { asks: true, ..entry("big", size) };
    let half = [Record::File(big), Record::From(0), Record::Content(&bytes[..50_000])];
    assert_eq!(said(&half, &to), Err(Stop::Gone));
    assert_eq!(list(&folder.path("to")), [".big.pavo-part"]);
    for (have, again) in [
        (begin()[..2_000_000].to_vec(), 3_000_000),
        (begin(), 0),
        ([&bytes[..1_000_000], b"!"].concat(), size),
        ([&begin()[..], b"more"].concat(), 0),
    ] {
        fs::remove_file(folder.path("to/big")).ok();
        fs::write(&part, &have).unwrap();
        fs::set_permissions(&part, Permissions::from_mode(0o600)).unwrap();
        let ended = copy(&[&from], &to).well();
        let pieces = ended.receiver.iter().filter(|seen| matches!(seen, Seen::Bytes(1..)));
        let skipped = (size - again > 0) as usize;
        let expected = (again as usize).div_ceil(BYTES) + skipped;
        assert_eq!((ended.bytes(), pieces.count()), (size, expected), "{} bytes", have.len());
        assert!(fs::read(folder.path("to/big")).unwrap() == bytes);
        assert_eq!(list(&folder.path("to")), ["big"]);
    }
    // What is there already, and the same, does not travel.
    let inode = fs::metadata(folder.path("to/big")).unwrap().ino();
    let ended = copy(&[&from], &to).well();
    assert_eq!(ended.receiver, [Seen::Total(size), Seen::Bytes(size)]);
    assert_eq!(fs::metadata(folder.path("to/big")).unwrap().ino(), inode);
    // Of the same size and time, and another.
    let file = File::options().write(true).open(folder.path("to/big")).unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(b"!", 4_000_000).unwrap();
    file.set_modified(time).unwrap();
    copy(&[&from], &to).well();
    assert!(fs::read(folder.path("to/big")).unwrap() == bytes);
    assert_eq!(list(&folder.path("to")), ["big"]);
}

#[test]
fn a_part_is_one_copys_alone_and_ours() {
    let folder = Folder::new();
    let from = folder.write("big", noise(2_000_000));
    fs::create_dir(folder.path("to")).unwrap();
    let (to, part) = (place(folder.path("to")), folder.path("to/.big.pavo-part"));
    fs::write(&part, "").unwrap();
    fs::set_permissions(&part, Permissions::from_mode(0o600)).unwrap();
    let file = File::open(&part).unwrap();
    let lock = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive).unwrap();
    let ended = copy(&[&from], &to);
    assert!(matches!(ended.received, Err(Stop::Own(why)) if why.contains("another copy")));
    assert!(part.exists());
    drop(lock);
    // Somebody else may hold it open, or have led it elsewhere.
    let victim = folder.write("victim", "precious");
    for make in [
        &(|| fs::set_permissions(&part, Permissions::from_mode(0o666)).unwrap()) as &dyn Fn(),
        &|| fs::hard_link(&victim, &part).unwrap(),
        &|| symlink(&victim, &part).unwrap(),
        &|| nix::unistd::mkfifo(&part, nix::sys::stat::Mode::S_IRWXU).unwrap(),
    ] {
        make();
        copy(&[&from], &to).well();
        assert_eq!(list(&folder.path("to")), ["big"]);
        assert!(fs::read(folder.path("to/big")).unwrap() == noise(2_000_000));
        fs::remove_file(folder.path("to/big")).unwrap();
    }
    assert_eq!(folder.read("victim"), "precious");
}

#[test]
fn a_sender_that_lies_writes_nothing_outside() {
    let folder = Folder::new();
    folder.write("outside/file", "precious");
    fs::create_dir(folder.path("to")).unwrap();
    let to = place(folder.path("to"));
    let outside = folder.path("outside").into_os_string().into_encoded_bytes();
    let link =
        |name: &str, target: &[u8]| Record::Link(Entry { target: target.into(), ..entry(name, 0) });
    let write = |name: &str| {
        vec![Record::File(entry(name, 3)), Record::Content(b"bad"), Record::End, Record::Finish]
    };
    let wrong = |records: &[Record<'_>]| {
        let outcome = said(records, &to);
        assert!(matches!(outcome, Err(Stop::Wrong(_) | Stop::Own(_))), "{outcome:?}: {records:?}");
    };
    for name in ["../outside/file", "/tmp/x", "..", ".", "", "a/b", "a\0b", &"x".repeat(256)] {
        wrong(&write(name));
        let folder = |name| Record::Folder(entry(name, 0));
        wrong(&[&[folder("d")], &*write(name)].concat());
        if !name.is_empty() {
            wrong(&[folder(name)]);
        }
        wrong(&[folder("d"), folder(name)]);
        wrong(&[folder("d"), link(name, b"x")]);
    }
    // Through a link that it has made before.
    for target in [&outside[..], b"../outside"] {
        wrong(&[link("l", target), Record::Folder(entry("l", 0))]);
        let inside = [Record::Folder(entry("d", 0)), link("l", target)];
        wrong(&[&inside[..], &[Record::Folder(entry("l", 0))]].concat());
    }
    // A link is replaced, not followed.
    let over = Entry { source: 1, ..entry("l", 3) };
    let file = [link("l", b"../outside/file"), Record::File(over), Record::Content(b"bad")];
    said(&[&file[..], &[Record::End, Record::Finish]].concat(), &to).unwrap();
    assert_eq!(
        (folder.read("to/l"), folder.read("outside/file")),
        ("bad".into(), "precious".into())
    );
    assert_eq!(list(&folder.path("outside")), ["file"]);
    // More than was said; more than there can be; what has no place.
    wrong(&[Record::File(entry("m", 2)), Record::Content(b"bad")]);
    wrong(&[Record::File(entry("m", 2)), Record::Content(b"b"), Record::Hole(2)]);
    wrong(&[Record::File(entry("m", 2)), Record::Hole(u64::MAX)]);
    wrong(&[Record::Leave]);
    wrong(&[Record::Content(b"x")]);
    wrong(&[Record::Folder(entry("d", 0)), Record::Finish]);
    wrong(&[Record::File(Entry { asks: true, ..entry("m", 2) }), Record::From(1)]);
    wrong(&vec![Record::Folder(entry("d", 0)); MAX_DEPTH + 1]);
    // What is begun and never ended is no file.
    let cut = [Record::File(entry("cut", 3)), Record::Content(b"ba")];
    assert_eq!(said(&cut, &to), Err(Stop::Gone));
    assert!(!list(&folder.path("to")).iter().any(|name| name.contains("cut") || name == "m"));
}

#[test]
fn only_what_was_asked_for_comes() {
    let folder = Folder::new();
    fs::create_dir(folder.path("to")).unwrap();
    let names = Some(vec![b"hosts".to_vec(), b"".to_vec()]);
    let to = Place { names, ..place(folder.path("to")) };
    let file = |source, name: &str| [Record::File(Entry { source, ..entry(name, 0) }), Record::End];
    for wrong in [
        file(0, ".bashrc").to_vec(),
        file(1, "hosts").to_vec(),
        file(2, "hosts").to_vec(),
        [file(0, "hosts"), file(0, "hosts")].concat(),
        file(1, "").to_vec(),
        vec![Record::Folder(Entry { source: 1, ..entry("x", 0) })],
    ] {
        assert!(matches!(said(&wrong, &to), Err(Stop::Wrong(_))), "{wrong:?}");
    }
    let (first, second) = (file(0, "hosts"), Record::Folder(Entry { source: 1, ..entry("", 0) }));
    let end = [second, Record::Leave, Record::Finish];
    said(&[&first[..], &end].concat(), &to).unwrap();
    assert_eq!(list(&folder.path("to")), ["hosts"]);
    // Under one name only one thing comes.
    let one = Place { names: None, ..place(folder.path("one")) };
    let two = [file(0, "a"), file(1, "b")].concat();
    assert!(matches!(said(&two, &one), Err(Stop::Wrong(_))));
}

#[test]
fn a_receiver_that_lies_is_an_error_of_the_copy() {
    let folder = Folder::new();
    let from = folder.write("big", noise(2_000_000));
    let answer = |records: &[Record<'_>]| {
        let mut bytes = Vec::new();
        records.iter().for_each(|record| record.write(&mut bytes).unwrap());
        send(&*bytes, std::io::sink(), std::slice::from_ref(&from), &mut drop)
    };
    let have = |length| Record::Have { length, digest: [0; 16] };
    assert_eq!(answer(&[have(u64::MAX), Record::Done]), Ok(()));
    assert_eq!(answer(&[have(1000), Record::Done]), Ok(()));
    assert_eq!(answer(&[have(0)]), Err(Stop::Gone));
    assert_eq!(answer(&[Record::Failed("full".into())]), Err(Stop::Told("full".into())));
    assert!(matches!(answer(&[Record::Done]), Err(Stop::Wrong(_))));
    assert!(matches!(answer(&[have(0), have(0)]), Err(Stop::Wrong(_))));
}

#[test]
fn a_full_disk_is_told_at_both_ends_and_no_part_is_left() {
    // A file system of 1 MiB, in a namespace of this thread alone.
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "this needs root");
        writeln!(std::io::stderr(), "SKIPPED: a full disk needs root").unwrap();
        return;
    }
    let folder = Folder::new();
    let from = folder.write("big", noise(4_000_000));
    let small = folder.path("small");
    fs::create_dir(&small).unwrap();
    let mount = |words: &[&str], at: &Path| {
        let status = std::process::Command::new("mount").args(words).arg(at).status();
        assert!(status.unwrap().success());
    };
    let full = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        mount(&["--make-rprivate"], Path::new("/"));
        mount(&["-t", "tmpfs", "-o", "size=1m", "none"], &small);
        let ended = copy(&[&from], &place(&small));
        (ended, list(&small))
    };
    let (ended, left) = std::thread::scope(|scope| scope.spawn(full).join().unwrap());
    let (Err(Stop::Own(ours)), Err(Stop::Told(told))) = (ended.received, ended.sent) else {
        panic!()
    };
    assert!(ours.ends_with("small/big`: No space left on device"), "{ours}");
    assert_eq!((ours, left), (told, Vec::<String>::new()));
}

#[test]
fn copies_that_make_one_folder_at_the_same_time_all_arrive() {
    const AT_ONCE: usize = 16;
    let folder = Folder::new();
    for round in 0..40 {
        let together = std::sync::Barrier::new(AT_ONCE);
        std::thread::scope(|scope| {
            let (folder, together) = (&folder, &together);
            let one = move |number: usize| {
                let path = folder.path(&format!("{round}/vm{number}"));
                let place = Place { into: true, ..place(path) };
                together.wait();
                said(&[Record::File(entry("name", 0)), Record::End, Record::Finish], &place)
            };
            let ends: Vec<_> =
                (0..AT_ONCE).map(|number| scope.spawn(move || one(number))).collect();
            for end in ends {
                assert_eq!(end.join().unwrap(), Ok(()), "round {round}");
            }
        });
        assert_eq!(list(&folder.path(&round.to_string())).len(), AT_ONCE);
    }
}

#[test]
fn names_are_shown_without_what_a_terminal_would_obey() {
    let folder = Folder::new();
    let to = Place { into: true, ..place(folder.path("to")) };
    let name = "\x1b]0;mine\x07\x1b[2J\u{9b}1m\n";
    let file = || [Record::File(entry(name, 0)), Record::End];
    let enter = || Record::Folder(Entry { mode: 0o755, ..entry(name, 0) });
    let wait = [Record::Folder(entry("d", 0))];
    let cases = [
        ("and is no folder", [&wait[..], &file(), &[enter()]].concat()),
        ("is a folder", [&wait[..], &[enter(), Record::Leave], &file()].concat()),
        (
            "making the link",
            [
                &wait[..],
                &[enter(), Record::Leave],
                &[Record::Link(Entry { target: b"x".into(), ..entry(name, 0) })],
            ]
            .concat(),
        ),
    ];
    for (expected, records) in cases {
        let Err(Stop::Own(why)) = said(&records, &to) else { panic!("{expected}") };
        assert!(why.contains(expected), "{why}");
        assert!(!why.contains(char::is_control), "{why:?}");
        fs::remove_dir_all(folder.path("to")).unwrap();
    }
}

#[test]
fn a_closed_folder_that_was_there_is_closed_again_whatever_happens() {
    let folder = Folder::new();
    folder.write("to/closed/old", "x");
    let closed = folder.path("to/closed");
    fs::set_permissions(&closed, Permissions::from_mode(0o500)).unwrap();
    let enter = Record::Folder(Entry { mode: 0o755, ..entry("closed", 0) });
    let half = [enter, Record::File(entry("new", 0)), Record::End];
    assert_eq!(said(&half, &place(folder.path("to"))), Err(Stop::Gone));
    let mode = fs::metadata(&closed).unwrap().mode() & 0o7777;
    fs::set_permissions(&closed, Permissions::from_mode(0o700)).unwrap();
    assert_eq!((mode, list(&closed)), (0o500, vec!["new".into(), "old".into()]));
}

#[test]
fn a_folder_that_may_not_be_written_is_the_cause_that_is_told() {
    let folder = Folder::new();
    if !nix::unistd::geteuid().is_root() {
        fs::set_permissions(folder.path(""), Permissions::from_mode(0o500)).unwrap();
    }
    // Of this thread alone; root may write where nobody else may.
    let before = nix::unistd::setfsuid(nix::unistd::Uid::from_raw(65_534));
    let file = File::open(&folder.0).unwrap();
    let refused = part::Part::open(std::os::fd::AsFd::as_fd(&file), b"x").map(drop).unwrap_err();
    nix::unistd::setfsuid(before);
    fs::set_permissions(folder.path(""), Permissions::from_mode(0o700)).unwrap();
    let part::Refused::Failed(error) = refused else { panic!("{refused:?}") };
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{error}");
}

#[test]
fn what_the_kernel_shows_as_files_is_no_part_of_a_folder() {
    let proc = File::open("/proc").unwrap();
    let root = File::open("/").unwrap();
    let leads_out = |at: &File, folder: &File| {
        use std::os::fd::AsFd;
        send::leads_out(at.as_fd(), folder.as_fd())
    };
    assert!(leads_out(&root, &proc));
    // Of what was asked for by its own name all is wanted.
    assert!(!leads_out(&proc, &File::open("/proc/self").unwrap()));
    assert!(!leads_out(&root, &File::open("/tmp").unwrap()));
    assert!(leads_out(&root, &File::open("/dev").unwrap()));
}
