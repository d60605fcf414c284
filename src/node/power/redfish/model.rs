//! What Redfish's documents say of power and boot device. Any JSON at all may come.
//!
//! DSP0266 1.20, schema `ComputerSystem`.

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::node::power::{Boot, Change, Device, Power, cannot_boot};

/// The longest link that is followed, in bytes.
const MAX_PATH: usize = 500;
/// The most systems of a controller that are looked at.
const MAX_SYSTEMS: usize = 4096;
/// The most values of a list of what is offered.
const MAX_OFFERED: usize = 64;

/// A link on the same host, if it is one.
fn path(value: Option<&Value>) -> Option<String> {
    let path = value?.as_str()?;
    let plain = path.len() <= MAX_PATH && path.bytes().all(|byte| byte.is_ascii_graphic());
    let here = path.starts_with('/') && !path.starts_with("//");
    (plain && here).then(|| path.to_owned())
}

/// The links to a collection's members.
pub fn members(collection: &Value) -> Vec<String> {
    let members = collection.get("Members").and_then(Value::as_array);
    let members = members.into_iter().flatten().take(MAX_SYSTEMS);
    members.filter_map(|member| path(member.get("@odata.id"))).collect()
}

/// The link to the next part of a collection.
pub fn next_page(collection: &Value) -> Option<String> {
    path(collection.get("Members@odata.nextLink"))
}

/// What comes last in a link.
pub fn id(path: &str) -> &str {
    let path = path.strip_suffix('/').unwrap_or(path);
    path.rsplit('/').next().unwrap_or(path)
}

/// Some texts, where there is a list of them.
fn texts(value: Option<&Value>) -> Option<Vec<String>> {
    let values = value?.as_array()?.iter().take(MAX_OFFERED);
    Some(values.filter_map(Value::as_str).filter(|text| is_word(text)).map(str::to_owned).collect())
}

fn is_word(text: &str) -> bool {
    text.len() <= 40 && text.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

/// What a description of the reset action says that it takes.
pub fn offered_by(info: &Value) -> Option<Vec<String>> {
    let parameters = info.get("Parameters")?.as_array()?;
    let is_type = |it: &&Value| it.get("Name").and_then(Value::as_str) == Some("ResetType");
    texts(parameters.iter().find(is_type)?.get("AllowableValues"))
}

/// Whether it is on, in Redfish's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    On,
    Off,
    PoweringOn,
    PoweringOff,
    /// Neither: it has power, and nothing runs.
    Paused,
}

impl State {
    fn read(text: &str) -> Option<Self> {
        Some(match text {
            "On" => Self::On,
            "Off" => Self::Off,
            "PoweringOn" => Self::PoweringOn,
            "PoweringOff" => Self::PoweringOff,
            "Paused" => Self::Paused,
            _ => return None,
        })
    }

    /// Whether it has power.
    pub fn power(self) -> Power {
        if self == Self::Off { Power::Off } else { Power::On }
    }

    /// Whether nothing is left to do for this change. One that is going off by itself may take
    /// for ever: `off` does not wait for that.
    pub fn is_done(self, change: Change) -> bool {
        match change {
            Change::On => matches!(self, Self::On | Self::PoweringOn),
            Change::Off => self == Self::Off,
            Change::Soft => matches!(self, Self::Off | Self::PoweringOff),
            Change::Reset => false,
        }
    }
}

/// What does the opposite of what it did before.
pub const PRESS: &str = "PushPowerButton";

/// A machine, as its controller describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct System {
    pub path: String,
    /// None where it is not said.
    pub state: Option<State>,
    pub boot: Boot,
    reset: Option<Reset>,
    boots: Option<Vec<String>>,
}

/// How it is reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reset {
    pub target: String,
    pub offered: Option<Vec<String>>,
    /// Where it says what is offered, if not here.
    pub info: Option<String>,
}

impl Reset {
    /// The controller's word for a change, of those that it offers.
    ///
    /// # Errors
    /// When none of them is that.
    pub fn choose(&self, change: Change, state: Option<State>) -> Result<&'static str> {
        // What a press of the button does depends on whether it is on.
        let words: &[&str] = match (change, state) {
            (Change::On, Some(State::Off)) => &["On", "ForceOn", PRESS],
            (Change::On, _) => &["On", "ForceOn"],
            (Change::Off, _) => &["ForceOff"],
            (Change::Soft, Some(State::On)) => &["GracefulShutdown", PRESS],
            (Change::Soft, _) => &["GracefulShutdown"],
            (Change::Reset, _) => &["ForceRestart", "PowerCycle"],
        };
        let Some(offered) = &self.offered else { return Ok(words[0]) };
        let is_offered = |word: &&&str| offered.iter().any(|it| it == **word);
        words.iter().find(is_offered).copied().ok_or_else(|| {
            let (words, offered) = (words.join(" or "), offered.join(", "));
            Error::system(format!("the controller offers no {words}, only: {offered}"))
        })
    }
}

impl System {
    /// Reads the document at `path`.
    ///
    /// # Errors
    /// When it is no system.
    pub fn read(path: String, document: &Value) -> Result<Self> {
        if !document.is_object() {
            return Err(Error::system("the controller's answer is no system"));
        }
        let state = document.get("PowerState").and_then(Value::as_str).and_then(State::read);
        let boot = document.get("Boot").unwrap_or(&Value::Null);
        let boots = texts(boot.get("BootSourceOverrideTarget@Redfish.AllowableValues"));
        Ok(Self { path, state, boot: read_boot(boot), reset: read_reset(document), boots })
    }

    /// How it is reset.
    ///
    /// # Errors
    /// When it does not say.
    pub fn reset(&self) -> Result<Reset> {
        let unsaid = || Error::system("the controller does not say how the system is reset");
        self.reset.clone().ok_or_else(unsaid)
    }

    /// What to change in it for this boot device.
    ///
    /// # Errors
    /// When it has no such device.
    pub fn boot_request(&self, boot: Boot) -> Result<Value> {
        let target = match boot.device {
            Device::Default => {
                return Ok(json!({ "Boot": { "BootSourceOverrideEnabled": "Disabled" } }));
            }
            Device::Net => "Pxe",
            Device::Disk => "Hdd",
            Device::Cdrom => "Cd",
            Device::Bios => "BiosSetup",
            Device::Other => return Err(cannot_boot(boot)),
        };
        if let Some(boots) = self.boots.as_ref().filter(|it| !it.iter().any(|it| it == target)) {
            let what = format!("the system cannot boot from `{}`", boot.device);
            return Err(Error::system(what).help(format!("it offers {}", boots.join(", "))));
        }
        let enabled = if boot.always { "Continuous" } else { "Once" };
        Ok(json!({ "Boot": {
            "BootSourceOverrideTarget": target,
            "BootSourceOverrideEnabled": enabled,
        } }))
    }
}

fn read_boot(boot: &Value) -> Boot {
    let text = |name: &str| boot.get(name).and_then(Value::as_str);
    let always = match text("BootSourceOverrideEnabled") {
        Some("Once") => false,
        Some("Continuous") => true,
        _ => return Boot::DEFAULT,
    };
    let device = match text("BootSourceOverrideTarget") {
        Some("Pxe" | "UefiHttp") => Device::Net,
        Some("Hdd") => Device::Disk,
        Some("Cd") => Device::Cdrom,
        Some("BiosSetup") => Device::Bios,
        None | Some("None") => return Boot::DEFAULT,
        Some(_) => Device::Other,
    };
    Boot { device, always }
}

fn read_reset(document: &Value) -> Option<Reset> {
    let action = document.get("Actions")?.get("#ComputerSystem.Reset")?;
    Some(Reset {
        target: path(action.get("target"))?,
        offered: texts(action.get("ResetType@Redfish.AllowableValues")),
        info: path(action.get("@Redfish.ActionInfo")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system(document: Value) -> System {
        System::read("/redfish/v1/Systems/1".into(), &document).unwrap()
    }

    #[test]
    fn what_a_controller_offers_is_what_it_is_asked_for() {
        let reset = |offered: Value| {
            system(json!({ "Actions": { "#ComputerSystem.Reset": {
                "target": "/reset", "ResetType@Redfish.AllowableValues": offered,
            } } }))
            .reset()
            .unwrap()
        };
        let some = reset(json!(["ForceOn", "PushPowerButton", "PowerCycle"]));
        let on = Some(State::On);
        assert_eq!(some.choose(Change::On, on).unwrap(), "ForceOn");
        assert_eq!(some.choose(Change::Soft, on).unwrap(), "PushPowerButton");
        assert_eq!(some.choose(Change::Reset, on).unwrap(), "PowerCycle");
        let why = some.choose(Change::Off, on).unwrap_err().to_string();
        assert!(why.contains("no ForceOff, only: ForceOn, PushPowerButton, PowerCycle"), "{why}");
        // Who does not say gets the usual.
        assert_eq!(reset(Value::Null).choose(Change::Off, on).unwrap(), "ForceOff");
        // The button is pressed only where it is known to do what is wanted.
        let button = reset(json!(["PushPowerButton"]));
        assert_eq!(button.choose(Change::On, Some(State::Off)).unwrap(), "PushPowerButton");
        for state in [None, on, Some(State::PoweringOff), Some(State::Paused)] {
            assert!(button.choose(Change::On, state).is_err(), "{state:?}");
        }
        for state in [None, Some(State::Off), Some(State::PoweringOff)] {
            assert!(button.choose(Change::Soft, state).is_err(), "{state:?}");
        }
        let info = json!({ "Parameters": [{ "Name": "ResetType", "AllowableValues": ["On"] }] });
        assert_eq!(offered_by(&info), Some(vec!["On".to_owned()]));
    }

    #[test]
    fn only_what_is_so_already_is_left_alone() {
        let done = |text: &str| {
            let state = State::read(text).unwrap();
            [Change::On, Change::Off, Change::Soft, Change::Reset].map(|it| state.is_done(it))
        };
        assert_eq!(done("On"), [true, false, false, false]);
        assert_eq!(done("PoweringOn"), [true, false, false, false]);
        assert_eq!(done("PoweringOff"), [false, false, true, false]);
        assert_eq!(done("Paused"), [false; 4]);
        assert_eq!(done("Off"), [false, true, true, false]);
    }

    #[test]
    fn no_link_leads_elsewhere() {
        for link in ["http://other/x", "//other/x", "x", "", "/a\r\nX: y", "/ü", "/a b"] {
            assert_eq!(path(Some(&json!(link))), None, "{link}");
        }
        let all = json!({ "Members": [
            { "@odata.id": "/redfish/v1/Systems/1/" }, { "@odata.id": 5 }, null,
            { "@odata.id": "http://other" },
        ] });
        assert_eq!(members(&all), ["/redfish/v1/Systems/1/"]);
        assert_eq!((id("/redfish/v1/Systems/1/"), id("/x"), id("/")), ("1", "x", ""));
    }

    #[test]
    fn a_boot_device_is_for_once_or_always_or_not_at_all() {
        let read = |enabled: &str, target: &str| {
            system(json!({ "Boot": {
                "BootSourceOverrideEnabled": enabled, "BootSourceOverrideTarget": target,
            } }))
            .boot
        };
        assert_eq!(read("Once", "Pxe"), Boot { device: Device::Net, always: false });
        assert_eq!(read("Continuous", "Hdd"), Boot { device: Device::Disk, always: true });
        assert_eq!(read("Disabled", "Hdd"), Boot::DEFAULT);
        assert_eq!(read("Once", "None"), Boot::DEFAULT);
        assert_eq!(read("Once", "Usb").device, Device::Other);
        let picky = system(json!({ "Boot": {
            "BootSourceOverrideTarget@Redfish.AllowableValues": ["Pxe", "\u{1b}[2J"],
        } }));
        let why = picky.boot_request(Boot { device: Device::Cdrom, always: false }).unwrap_err();
        assert_eq!(
            why.report(),
            "error: the system cannot boot from `cdrom`\n  help: it offers Pxe"
        );
    }
}
