//! The contract and the routes are of the same paths and methods.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{routes, system};

#[test]
fn each_route_is_in_the_contract_and_nothing_else() {
    let contract: Value = serde_yaml::from_str(system::OPENAPI).unwrap();
    let paths = contract["paths"].as_object().unwrap();
    let ours: BTreeSet<&str> = routes().iter().map(|(path, _)| *path).collect();
    let theirs: BTreeSet<&str> = paths.keys().map(String::as_str).collect();
    assert_eq!(ours, theirs);
}

#[test]
fn the_nouns_and_actions_are_those_of_the_contract() {
    use crate::model::node::request::Noun;
    use crate::model::order::{Order, Wanted};
    let contract: Value = serde_yaml::from_str(system::OPENAPI).unwrap();
    let words = |value: &Value| -> Vec<String> {
        value.as_array().unwrap().iter().map(|it| it.as_str().unwrap().to_owned()).collect()
    };
    let nouns: Vec<&str> = Noun::ALL.iter().map(|noun| noun.plural()).collect();
    assert_eq!(words(&contract["components"]["parameters"]["kind"]["schema"]["enum"]), nouns);
    let order = &contract["components"]["schemas"]["Order"]["properties"];
    for word in words(&order["action"]["enum"]) {
        let wanted: Wanted = serde_json::from_value(word.clone().into()).unwrap();
        assert!(wanted.verb().contains(&word) || word == "bootdev");
    }
    let usual = serde_json::to_value(Order::new("n1".into(), Wanted::Status)).unwrap();
    for (key, value) in usual.as_object().unwrap() {
        let schema = order.get(key).unwrap_or_else(|| panic!("no `{key}` in the contract"));
        if let Some(default) = schema.get("default") {
            assert_eq!(default, value, "{key}");
        }
    }
}
