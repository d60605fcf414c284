//! Virtual machines of libvirt, of which here is only a small part: a program with its words.

use std::fs;

use pavo::node::power::action::Action;
use pavo::node::power::virsh::Settings;
use pavo::node::power::{Bmc, Control};

use crate::contract::{World, contract, script};
use crate::{fails, plan};

/// It knows `n1`, at one address, and refuses what libvirt refuses.
const VIRSH: &str = r#"#!/bin/sh
cd "${0%/*}"
[ "$1 $2 $3" = "-q -c qemu+ssh://admin@host1/system?no_tty=1" ] || exit 2
shift 3
verb=$1
shift
[ "$verb" = define ] || for domain; do :; done
no() { echo "error: $*" >&2; exit 1; }
[ "$verb" = define ] || [ "$domain" = n1 ] || no "failed to get domain '$domain'"
case $verb in
domstate) if [ -e on ]; then echo running; else echo 'shut off'; fi; echo ;;
start) [ ! -e on ] || no 'Domain is already active'; touch on ;;
destroy | shutdown) [ -e on ] || no 'domain is not running'; rm on ;;
reset) [ -e on ] || no 'domain is not running' ;;
dumpxml) [ "$1 $2" = '--inactive --security-info' ] && cat definition ;;
define) [ "$1" = /dev/stdin ] && cat >new && mv new definition ;;
*) exit 3 ;;
esac
"#;

#[test]
fn a_virtual_machine_of_libvirt() {
    let dir = tempfile::tempdir().unwrap();
    let definition = "<domain type='kvm'>\n  <name>n1</name>\n  <os>\n    <type>hvm</type>\n    \
                      <boot dev='hd'/>\n  </os>\n  <graphics passwd='kept'/>\n</domain>\n";
    fs::write(dir.path().join("definition"), definition).unwrap();
    script(&dir.path().join("virsh"), VIRSH);
    script(&dir.path().join("hangs"), "#!/bin/sh\nexec sleep 600\n");
    let at = dir.path().to_owned();
    let of = |program: &str, domain: &str| {
        let program = at.join(program).to_str().unwrap().to_owned();
        let (uri, domain) = ("qemu+ssh://admin@host1/system?no_tty=1".into(), domain.to_owned());
        Bmc { node: domain.clone(), control: Control::Virsh(Settings { program, uri, domain }) }
    };
    let unknown = of("virsh", "n2");
    let why = fails(&unknown, &plan(Action::Status));
    assert!(why.contains("failed to get domain 'n2'"), "{why}");
    let on = at.join("on");
    contract(&World {
        bmc: of("virsh", "n1"),
        is_on: Box::new(move || on.exists()),
        once: false,
        reads: true,
        forgets: true,
        listens: true,
        wrong: Some(unknown),
        dead: Some(of("hangs", "n1")),
        _alive: Box::new(()),
    });
    let kept = fs::read_to_string(dir.path().join("definition")).unwrap();
    assert!(kept.contains("passwd='kept'") && !kept.contains("<boot"), "{kept}");
}
