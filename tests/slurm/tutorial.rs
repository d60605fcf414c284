//! What `make lab` tells people to try, as alice on two hosts.

use std::time::Duration;

use super::terminal::Terminal;
use super::world::Site;

#[test]
fn the_tutorial_does_what_it_says() {
    let site = Site::up(2);
    let bare: Vec<_> = site.lab.computes().map(|host| site.lab.leaks(host.name())).collect();
    let before = site.snapshot();
    let template = r"mkdir -p ~/.pavo
        printf 'mine:\n  image: tiny\n  description: my own\n' >~/.pavo/templates.yaml
        pavo template list";
    assert!(site.sh("alice", template).contains("mine\ttiny\tdefault\t\tmy own\n"));

    let mut shell = Terminal::open(&site, "pavo alloc -c1 -N2 --wait ssh mine:4");
    shell.sees("(pavo/1)");
    assert!(shell.said().contains("Granted job allocation 1"), "{}", shell.said());
    shell.enters("pavo status | cat");
    for host in ["n1", "n2"] {
        shell.sees(&format!("{}{host}", site.lab.prefix()));
    }
    shell.enters("pavo ssh vm0 ping -c1 -W5 vm3");
    shell.sees("1 packets received");
    shell.enters("pavo console vm3");
    shell.sees("vm3 ready");
    shell.types("\nhostname | sed s/vm/the-console-of-/\n");
    shell.sees("the-console-of-3");
    for _ in 0..3 {
        shell.types("\x03");
        std::thread::sleep(Duration::from_millis(100));
    }
    shell.enters("echo left on $(hostname)");
    shell.sees(&format!("left on {}login", site.lab.prefix()));
    shell.enters("exit");
    assert_eq!(shell.ends(), 0, "{}", shell.said());

    let job = site.batch("alice", "-c1 -N2 -E 'pavo status' mine:2");
    site.until("alice", &format!("scontrol show job {job}"), "JobState=COMPLETED");
    let said = site.sh("alice", &format!("cat job-{job}"));
    assert!(said.contains("vm[0-1] run\nVM\t"), "{said}");

    let job = site.batch("alice", "-c1 -N2 mine:2");
    site.until("alice", "pavo ps", "\trunning\t");
    site.sh("alice", "scancel -n pavo");
    site.ended(job);
    assert!(!site.sh("alice", "pavo ps").contains("mine"));
    site.nothing_left(&before);
    for (host, bare) in site.lab.computes().zip(bare) {
        host.sh("pavo internal setup cleanup").unwrap();
        let settled = site.lab.settled(host.name(), &bare.unwrap(), Duration::from_secs(60));
        settled.unwrap_or_else(|left| panic!("{left}"));
    }
}
