//! What who looks at a console is told of its VM.

use std::process::Stdio;

use super::save::mortal_image;
use super::world::world;

#[test]
fn a_console_says_when_the_guest_powers_off_and_when_the_vm_ends() {
    world(|world| {
        mortal_image(world);
        let alloc = world.idle(&["mortal"]);
        let mut attached = world.pavo_command(&["console", "vm0"]);
        attached.stdin(Stdio::piped());
        let attached = world.start_with_input(attached);
        let followed = world.start(world.pavo_command(&["console", "--follow"]));
        for console in [&attached, &followed] {
            console.wait_for("vm0 powered off; `pavo reset vm0` starts it");
        }
        // Who comes now is told, too.
        let late = world.start(world.pavo_command(&["console", "--follow"]));
        late.wait_for("vm0 powered off; `pavo reset vm0` starts it");
        world.ok(&["reset", "vm0"]);
        for console in [&attached, &followed, &late] {
            console.wait_for("vm0 runs");
        }
        world.ok(&["cancel"]);
        alloc.finish();
        for console in [attached, followed, late] {
            let output = console.finish();
            assert_eq!(output.code, Some(0), "{output}");
            assert!(output.stderr.contains("vm0 has ended"), "{output}");
            assert!(!output.stdout.contains("vm0 "), "{output}");
        }
    });
}
