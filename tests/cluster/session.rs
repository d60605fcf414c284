//! A session beside a cluster: its script or shell, its name, its limits, its end.

use super::world::world;

#[test]
fn the_scripts_exit_code_is_passed_through_and_it_knows_its_job() {
    world(|world| {
        let script = "echo $PAVO_JOB_ID $PAVO_JOB_NAME $PCOCC_JOB_ID; exit 7";
        let output = world.alloc(&["tiny:1", "--mem", "128", "-J", "mine", "-E", script]).finish();
        assert_eq!(output.code, Some(7), "{output}");
        assert_eq!(output.stdout, "1 mine 1\n");
        assert!(output.stderr.contains("Granted job allocation 1\n"), "{output}");
    });
}
