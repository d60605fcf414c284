//! What every driver has to do, in each world that there is: the simulator, real programs that
//! pass for controllers, QEMU, a script.

use std::any::Any;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pavo::node::power::action::{Action, Done};
use pavo::node::power::ipmi::{Settings, Suite, SuiteChoice};
use pavo::node::power::redfish::{self, Trust};
use pavo::node::power::{Bmc, Boot, Control, Device, Power, exec, ipmitool, qmp};
use pavo_fakes::{Bmcs, Manner, PASSWORD, Tls, USER};

use crate::{done, fails, impatient, ipmi, plan, settings};

/// A machine that is off, and what controls it.
pub struct World {
    pub bmc: Bmc,
    /// Whether it is on, as the world itself sees it.
    pub is_on: Box<dyn Fn() -> bool>,
    /// The boot device may be for once.
    pub once: bool,
    /// The boot device can be read.
    pub reads: bool,
    /// The firmware's own one can be given back.
    pub forgets: bool,
    /// It has an operating system that listens.
    pub listens: bool,
    /// The same with a password that is not right.
    pub wrong: Option<Bmc>,
    /// One that nobody answers for.
    pub dead: Option<Bmc>,
    pub _alive: Box<dyn Any>,
}

/// A password that no error may show.
const WRONG: &str = "hunter2 hunter2";

/// It takes no spaces.
const SPACELESS: &str = "correct-horse";

/// Waits until the machine is so, for whom the controller sees it and for the world: it answers
/// before it is done.
fn becomes(world: &World, power: Power) {
    let given_up = Instant::now() + Duration::from_secs(60);
    let seen = || (done(&world.bmc, Action::Status), (world.is_on)());
    while seen() != (Done::Power(power), power == Power::On) {
        assert!(Instant::now() < given_up, "{:?} instead of {power}", seen());
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn contract(world: &World) {
    let World { bmc, .. } = world;
    becomes(world, Power::Off);
    // A second time changes nothing.
    for _ in 0..2 {
        done(bmc, Action::On);
        becomes(world, Power::On);
    }
    assert_eq!(done(bmc, Action::Reset), Done::Reset);
    becomes(world, Power::On);
    assert_eq!(done(bmc, Action::Boot), Done::Reset, "it is on");
    becomes(world, Power::On);
    assert!(matches!(done(bmc, Action::Cycle), Done::Cycled(_)));
    becomes(world, Power::On);
    if world.listens {
        assert!(matches!(done(bmc, Action::Soft), Done::Reached(Power::Off, _)));
    } else {
        let mut soft = plan(Action::Soft);
        soft.patience.settle = Duration::from_millis(300);
        let why = fails(bmc, &soft);
        assert!(why.contains("still on") && why.contains("help: its operating system"), "{why}");
        for _ in 0..2 {
            done(bmc, Action::Off);
            becomes(world, Power::Off);
        }
    }
    becomes(world, Power::Off);
    assert_eq!(done(bmc, Action::Soft), Done::Power(Power::Off), "it is off already");
    assert_eq!(done(bmc, Action::Boot), Done::Power(Power::On));
    becomes(world, Power::On);
    assert_eq!(done(bmc, Action::Off), Done::Power(Power::Off));
    becomes(world, Power::Off);
    assert_eq!(done(bmc, Action::Cycle), Done::Power(Power::On), "it was off");
    becomes(world, Power::On);
    rehearsal(world);
    boot_devices(world);
    failures(world);
}

fn rehearsal(world: &World) {
    for action in [Action::Off, Action::Cycle, Action::Soft] {
        let plan = pavo::node::power::fanout::Plan { dry_run: true, ..plan(action) };
        let said = crate::text(&crate::one(&world.bmc, &plan));
        assert!(said.starts_with("would ") && said.ends_with(" (is on)"), "{said}");
        assert!((world.is_on)(), "it was done");
    }
}

fn boot_devices(world: &World) {
    for device in [Device::Net, Device::Disk, Device::Cdrom, Device::Default] {
        for always in [true, false] {
            let skips_once = !always && !world.once;
            if skips_once || (device == Device::Default && !world.forgets) {
                continue;
            }
            let boot = Boot { device, always: always && device != Device::Default };
            done(&world.bmc, Action::SetBootDevice(boot));
            if world.reads {
                assert_eq!(done(&world.bmc, Action::BootDevice), Done::Boot(boot));
            }
        }
    }
    let other = Boot { device: Device::Other, always: false };
    let why = fails(&world.bmc, &plan(Action::SetBootDevice(other)));
    assert!(why.contains("`other` cannot be set"), "{why}");
}

fn failures(world: &World) {
    for action in [Action::Status, Action::On, Action::BootDevice] {
        if let Some(bmc) = &world.wrong {
            let why = fails(bmc, &plan(action));
            assert!(!why.contains("hunter2") && !why.contains("tries"), "{why}");
        }
        if let Some(bmc) = &world.dead {
            let begun = Instant::now();
            let why = fails(bmc, &impatient(action));
            let took = begun.elapsed();
            assert!(took < Duration::from_secs(20), "{took:?}");
            assert!(!why.contains("hunter2"), "{why}");
        }
    }
    let shown = format!("{:?} {:?}", world.bmc, world.wrong);
    assert!(!shown.contains("hunter2") && !shown.contains(PASSWORD), "{shown}");
}

/// Three simulated ones: the world's, the same with another password, a dead one.
fn simulated(control: impl Fn(Settings) -> Control) -> World {
    let bmcs = std::rc::Rc::new(Bmcs::start(3, Duration::ZERO, 0).unwrap());
    bmcs.with(2, |bmc| bmc.manner = Manner::Dead);
    let of = |index, password: &str| {
        let password = password.to_owned().into();
        let control = control(Settings { password, ..settings(&bmcs, index) });
        Bmc { node: format!("n{index}"), control }
    };
    let (bmc, wrong, dead) = (of(0, PASSWORD), of(1, WRONG), of(2, WRONG));
    let looked = bmcs.clone();
    World {
        bmc,
        is_on: Box::new(move || looked.with(0, |bmc| bmc.on)),
        once: true,
        reads: true,
        forgets: true,
        listens: true,
        wrong: Some(wrong),
        dead: Some(dead),
        _alive: Box::new(bmcs),
    }
}

#[test]
fn ipmi_against_the_simulator() {
    contract(&simulated(Control::Ipmi));
}

#[test]
fn ipmi_against_a_simulator_of_the_older_suite() {
    let suite = SuiteChoice::Only(Suite::Three);
    contract(&simulated(|settings| Control::Ipmi(Settings { suite, ..settings })));
}

/// Whether a program is there; loud where not, and an error where it has to be.
#[expect(clippy::print_stderr, reason = "a skip is never silent")]
fn has(program: &str) -> bool {
    let path = ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/bin"];
    if path.iter().any(|dir| Path::new(dir).join(program).exists()) {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "needs `{program}`");
    eprintln!("skipped: needs `{program}`");
    false
}

/// The peer: it would not speak with a simulator that is not honest.
#[test]
fn ipmitool_against_the_simulator() {
    if !has("ipmitool") {
        return;
    }
    for suite in ["3", "17"] {
        contract(&simulated(|it| {
            Control::Ipmitool(ipmitool::Settings {
                port: it.port,
                options: ["-C", suite].map(str::to_owned).to_vec(),
                ..ipmitool::Settings::new(it.address, it.user, it.password)
            })
        }));
    }
}

#[test]
fn redfish_against_the_simulator() {
    for tls in [Tls::None, Tls::Own] {
        let bmcs = Bmcs::start(3, Duration::ZERO, 0).unwrap();
        bmcs.with(2, |bmc| bmc.manner = Manner::Dead);
        let redfish = bmcs.redfish(tls).unwrap();
        let trust = if tls == Tls::Own { Trust::Anybody } else { Trust::Plain };
        let of = |index, password: &str| {
            let settings = crate::redfish::at(&redfish, index, trust.clone());
            let password = password.to_owned().into();
            let control = Control::Redfish(redfish::Settings { password, ..settings });
            Bmc { node: format!("n{index}"), control }
        };
        let bmcs = std::rc::Rc::new(bmcs);
        let looked = bmcs.clone();
        contract(&World {
            bmc: of(0, PASSWORD),
            is_on: Box::new(move || looked.with(0, |bmc| bmc.on)),
            once: true,
            reads: true,
            forgets: true,
            listens: true,
            wrong: Some(of(1, WRONG)),
            dead: Some(of(2, WRONG)),
            _alive: Box::new((bmcs, redfish)),
        });
    }
}

/// OpenStack's emulator; `make test` installs it.
#[test]
fn redfish_against_openstacks_emulator() {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/sushy/bin/sushy-emulator");
    if !program.exists() {
        assert!(std::env::var_os("CI").is_none(), "needs `make target/sushy`");
        eprintln!("skipped: needs `make target/sushy`");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let systems: Vec<String> = (0..1000)
        .map(|it| {
            format!(
                "{{'uuid': '00000000-0000-0000-0000-{it:012}', 'name': 'n{it}', \
                 'power_state': 'Off', 'nics': []}}"
            )
        })
        .collect();
    let config = format!(
        "SUSHY_EMULATOR_LISTEN_IP = '127.0.0.1'\nSUSHY_EMULATOR_LISTEN_PORT = {port}\n\
         SUSHY_EMULATOR_STATE_DIR = '{}'\nSUSHY_EMULATOR_FAKE_DRIVER = True\n\
         SUSHY_EMULATOR_FAKE_SYSTEMS = [{}]\n",
        dir.path().display(),
        systems.join(", ")
    );
    let file = dir.path().join("sushy.conf");
    fs::write(&file, config).unwrap();
    let child = Command::new(program)
        .args(["--fake", "--config", file.to_str().unwrap()])
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let process = Process(child.unwrap());
    let id = "00000000-0000-0000-0000-000000000777";
    let given_up = Instant::now() + Duration::from_secs(120);
    while page(port, id).is_none() {
        assert!(Instant::now() < given_up, "the emulator does not start");
        std::thread::sleep(Duration::from_millis(50));
    }
    let of = |port: u16| {
        let usual = redfish::Settings::new("127.0.0.1", "", String::new().into());
        let system = Some(id.to_owned());
        let settings = redfish::Settings { port, trust: Trust::Plain, system, ..usual };
        Bmc { node: "n777".into(), control: Control::Redfish(settings) }
    };
    contract(&World {
        bmc: of(port),
        is_on: Box::new(move || page(port, id).unwrap().contains("\"PowerState\": \"On\"")),
        once: false,
        reads: true,
        forgets: false,
        listens: true,
        wrong: None,
        dead: Some(of(free_port())),
        _alive: Box::new((process, dir)),
    });
}

/// What the emulator says of a system.
fn page(port: u16, id: &str) -> Option<String> {
    use std::io::Write;
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).ok()?;
    write!(stream, "GET /redfish/v1/Systems/{id} HTTP/1.0\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

/// A process that ends with this.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn script(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, PermissionsExt::from_mode(0o700)).unwrap();
}

/// A port that nobody has.
fn free_port() -> u16 {
    std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn ipmi_against_openipmis_simulator() {
    if !has("ipmi_sim") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().to_str().unwrap().to_owned();
    let port = free_port();
    let lan = format!(
        "name \"sim\"\nset_working_mc 0x20\n startlan 1\n  addr 127.0.0.1 {port}\n  priv_limit admin\n  \
         allowed_auths_admin none md2 md5 straight\n  guid a123456789abcdefa123456789abcdef\n \
         endlan\n chassis_control \"{at}/control\"\n \
         user 2 true \"admin\" \"{SPACELESS}\" admin 10 none md2 md5 straight\n"
    );
    fs::write(dir.path().join("lan.conf"), lan).unwrap();
    let mc = "mc_setbmc 0x20\nmc_add 0x20 0 no-device-sdrs 0x23 9 8 0x9f 0x1291 0xf02\n\
              mc_enable 0x20\n";
    fs::write(dir.path().join("sim.emu"), mc).unwrap();
    fs::create_dir(dir.path().join("state")).unwrap();
    fs::write(dir.path().join("power"), "0").unwrap();
    let control = format!(
        "#!/bin/sh\ncase \"$1 $2\" in\n\"get power\") echo power:$(cat {at}/power);;\n\
         \"get boot\") echo boot:none;;\n\"set power\") echo $3 > {at}/power;;\n\
         \"set shutdown\") echo 0 > {at}/power;;\n\"set boot\") echo $3 >> {at}/boot;;\nesac\n"
    );
    script(&dir.path().join("control"), &control);
    let child = Command::new("ipmi_sim")
        .args(["-n", "-c", "lan.conf", "-f", "sim.emu", "-s", "state"])
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let process = Process(child.unwrap());
    let of = |password: &str| {
        let password = password.to_owned().into();
        ipmi(Settings { port, ..Settings::new("127.0.0.1", USER, password) })
    };
    let power = dir.path().join("power");
    let world = World {
        bmc: of(SPACELESS),
        is_on: Box::new(move || fs::read_to_string(&power).unwrap().trim() == "1"),
        once: true,
        // It never says that its answer is valid.
        reads: false,
        forgets: true,
        listens: true,
        wrong: Some(of(WRONG)),
        dead: None,
        _alive: Box::new(process),
    };
    contract(&world);
    let set = fs::read_to_string(dir.path().join("boot")).unwrap();
    assert!(set.starts_with("pxe\npxe\ndefault\ndefault\ncdrom\n"), "{set}");
}

#[test]
fn a_program_of_the_site() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().to_str().unwrap().to_owned();
    // It has its password from standard input, and its node as one word.
    let text = format!(
        "#!/bin/sh\nread password\n[ \"$password\" = \"{PASSWORD}\" ] || {{ echo no entry >&2; exit 1; }}\n\
         [ \"$1 $2\" = \"a b n1; x\" ] || exit 2\nshift 2\ncd {at}\ncase \"$1\" in\n\
         status) cat power;;\non) echo on > power;;\noff|soft) echo off > power;;\nreset) ;;\n\
         bootdev) if [ \"$2\" ]; then echo \"$2 $3\" > boot; else cat boot; fi;;\n*) exit 3;;\nesac\n"
    );
    script(&dir.path().join("socket"), &text);
    fs::write(dir.path().join("power"), "off").unwrap();
    let of = |password: &str| Bmc {
        node: "n1".into(),
        control: Control::Exec(exec::Settings {
            program: format!("{at}/socket"),
            arguments: vec!["a b".into()],
            node: "n1; x".into(),
            password: Some(password.to_owned().into()),
        }),
    };
    let power = dir.path().join("power");
    let wrong = of(WRONG);
    let why = fails(&wrong, &plan(Action::Status));
    assert!(why.contains("no entry"), "{why}");
    contract(&World {
        bmc: of(PASSWORD),
        is_on: Box::new(move || fs::read_to_string(&power).unwrap().trim() == "on"),
        once: true,
        reads: true,
        forgets: true,
        listens: true,
        wrong: Some(wrong),
        dead: None,
        _alive: Box::new(dir),
    });
}

#[test]
fn a_virtual_machine_by_the_socket_of_its_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, own) = (dir.path().join("node"), dir.path().join("own"));
    let disk = dir.path().join("disk");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let monitor = |path: &Path| format!("unix:{},server=on,wait=off", path.display());
    let file = format!("file={},format=raw,if=none,id=file", disk.display());
    let child = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none", "-S"])
        .args(["-no-shutdown", "-qmp", &monitor(&socket), "-qmp", &monitor(&own)])
        .args(["-device", "virtio-net-pci,id=nic0", "-drive", &file])
        .args(["-device", "virtio-blk-pci,drive=file,id=disk0"])
        .args(["-device", "virtio-scsi-pci", "-device", "scsi-cd,id=cd0"])
        .stdin(Stdio::null())
        .spawn();
    let process = Process(child.unwrap());
    let given_up = Instant::now() + Duration::from_secs(120);
    while !own.exists() {
        assert!(Instant::now() < given_up, "QEMU does not start");
        std::thread::sleep(Duration::from_millis(10));
    }
    let of = |socket: &Path| Bmc {
        node: "vm".into(),
        control: Control::Qmp(qmp::Settings {
            socket: socket.to_owned(),
            net: Some("nic0".into()),
            disk: Some("disk0".into()),
            cdrom: Some("cd0".into()),
        }),
    };
    contract(&World {
        bmc: of(&socket),
        is_on: Box::new(move || runs(&own)),
        once: false,
        reads: true,
        forgets: true,
        listens: false,
        wrong: None,
        dead: Some(of(&dir.path().join("nothing"))),
        _alive: Box::new((process, dir)),
    });
}

/// Whether QEMU says so at its other socket.
fn runs(socket: &Path) -> bool {
    use std::io::Write;
    let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    for command in ["qmp_capabilities", "query-status"] {
        writeln!(stream, "{{\"execute\": \"{command}\"}}").unwrap();
    }
    let lines = BufReader::new(stream.take(1 << 20)).lines().map(Result::unwrap);
    let mut lines = lines.filter(|line| line.contains("running"));
    lines.next().unwrap().contains("\"running\": true")
}
