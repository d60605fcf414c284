//! What node sets are to be.

use super::expr::{Test, Want};
use super::fold::Style;
use super::parse::{nodes, parse};
use super::*;

/// Groups and attributes that are known here.
fn give(want: &Want) -> Result<NodeSet> {
    let text = match want {
        Want::All => "n[1-9]",
        Want::Group { source: None, name } if name == "rack1" => "n[1-4]",
        Want::Group { source: None, name } if name == "rack2" => "n[5-8]",
        Want::Group { source: Some(source), .. } if source == "slurm" => "n[2-3]",
        Want::Attribute { test: Test::Is, .. } => "n2,n4",
        Want::Attribute { test: Test::IsNot, .. } => "n9",
        Want::Attribute { .. } => "n7",
        Want::Matching(_) => "n5",
        Want::File(_) => "x1,n1",
        Want::Group { .. } => "",
    };
    if text.is_empty() { Ok(NodeSet::default()) } else { set(text) }
}

fn set(text: &str) -> Result<NodeSet> {
    nodes(text, &mut give)
}

fn folded(text: &str) -> String {
    set(text).unwrap_or_else(|error| panic!("{}", error.report())).to_string()
}

#[test]
fn names_are_expanded_and_folded() {
    for (text, full) in [
        ("n1", "n1"),
        ("n3,n1,n2,n2", "n[1-3]"),
        ("cn[43-45,47]", "cn[43-45,47]"),
        ("r[1-3]u[01-10]", "r[1-3]u[01-10]"),
        ("n[0-10/2]", "n[0,2,4,6,8,10]"),
        ("node[1-25]-bmc", "node[1-25]-bmc"),
        ("n[001-010]", "n[001-010]"),
        ("n[08-11]", "n[08-11]"),
        ("n[098-1000]!n[100-999]", "n[098-099,1000]"),
        ("n[8-11]", "n[8-11]"),
        ("n01,n1,n001,n02,n2", "n[1-2,01-02,001]"),
        ("n98,n99,n099,n100,n101", "n[98-99,099-101]"),
        ("n1[2-3]", "n[12-13]"),
        ("n[1-2]3[4-5]", "n[134-135,234-235]"),
        ("[1-3]", "[1-3]"),
        ("a[1-2]b[1-2],a1b3", "a1b[1-3],a2b[1-2]"),
        ("x1y2z3,x1y3z3,x2y2z3,x2y3z3", "x[1-2]y[2-3]z3"),
        ("b1,a1,a1-ib,login,a2", "a[1-2],a1-ib,b1,login"),
        ("n12345678901234567890,n1", "n1,n12345678901234567890"),
        ("n0,n00,n000", "n[0,00,000]"),
        ("n[1, 2]", "n[1-2]"),
    ] {
        assert_eq!(folded(text), full, "{text}");
    }
    assert_eq!(set("r[2-1],x").unwrap_err().kind(), crate::error::Kind::Usage);
    assert_eq!(set("n[08-10],b").unwrap().names(), ["b", "n08", "n09", "n10"]);
}

#[test]
fn slurm_gets_brackets_at_the_end_only_and_short_ranges() {
    for (text, slurm) in [
        ("n[1-3]", "n[1-3]"),
        ("n[1-2]-bmc", "n1-bmc,n2-bmc"),
        ("r[1-2]u[1-3]", "r[1-2]u[1-3]"),
        ("r[1-2]u3", "r[1-2]u[3]"),
        ("r1u3", "r1u3"),
        ("r1u[3-4]", "r1u[3-4]"),
        ("a[1-2]b[1-2]c,d", "a1b1c,a1b2c,a2b1c,a2b2c,d"),
        ("n[1-65537]", "n[1-65536,65537]"),
        ("n[0-200000]", "n[0-65535,65536-131071,131072-196607,196608-200000]"),
    ] {
        assert_eq!(set(text).unwrap().fold(Style::Slurm), slurm, "{text}");
    }
}

#[test]
fn operators_are_read_from_left_to_right() {
    for (text, full) in [
        ("n[1-5]!n3", "n[1-2,4-5]"),
        ("n[1-5] ! n3", "n[1-2,4-5]"),
        ("n[1-5],!n3", "n[1-2,4-5]"),
        ("n[1-5]&n[3-9]", "n[3-5]"),
        ("n[1-5]^n[3-9]", "n[1-2,6-9]"),
        ("n[1-5] n7", "n[1-5,7]"),
        ("n[1-5]!n[2-4],n3", "n[1,3,5]"),
        ("n[1-5]!(n[2-4],n3)", "n[1,5]"),
        ("(n1)(n2)", ""),
        ("login,r[1-2]u1&r2u[1-3]", "r2u1"),
        ("a,b!a", "b"),
    ] {
        match full {
            "" => assert!(set(text).is_err(), "{text}"),
            full => assert_eq!(folded(text), full, "{text}"),
        }
    }
}

#[test]
fn others_give_what_the_text_names() {
    for (text, full) in [
        ("all", "n[1-9]"),
        ("all!n[1-8]", "n9"),
        ("@rack1", "n[1-4]"),
        ("@rack[1-2]", "n[1-8]"),
        ("@rack1&arch=x86_64", "n[2,4]"),
        ("arch!=x86", "n9"),
        ("control/bmc_address~=^10[.],n1", "n[1,7]"),
        ("notes=\"a, b!\"", "n[2,4]"),
        ("@slurm:debug!n2", "n3"),
        ("~^n[0-9]{1,2}$,n6", "n[5-6]"),
        ("@list.txt", "n1,x1"),
        ("@./list", "n1,x1"),
        ("@-", "n1,x1"),
        ("@\"my list\"", "n1,x1"),
    ] {
        assert_eq!(folded(text), full, "{text}");
    }
    let expr = parse("@rack[1-2]!(arch=\"a b\",@job:1234 ~x)").unwrap();
    let wants: Vec<String> = expr.wants().iter().map(ToString::to_string).collect();
    assert_eq!(wants, ["@rack1", "@rack2", "arch=a b", "@job:1234", "~x"]);
}

#[test]
fn an_empty_set_is_an_error_and_never_all() {
    for text in ["n1!n1", "@none", "n1&n2", "n1^n1"] {
        let report = set(text).unwrap_err().report();
        assert!(report.starts_with(&format!("error: `{text}` is a set without any node")));
    }
    assert!(parse("").is_err() && parse(" ").is_err() && parse("()").is_err());
}

/// What is said of a text, and what the mark points at.
fn said(text: &str) -> (String, usize) {
    let report = parse(text).map(|_| ()).unwrap_err().report();
    let lines: Vec<&str> = report.lines().collect();
    let what = lines[1].strip_prefix("  because: ").unwrap().trim_end_matches(':').to_owned();
    (what, lines[3].find('^').unwrap() - 4)
}

#[test]
fn a_mistake_is_shown_where_it_is() {
    let huge = "n[1-10000000]";
    for (text, what, at) in [
        ("node[1-", "this bracket is not closed", 4),
        ("node[9-1]", "`9-1` runs backwards", 5),
        (huge, "with this it stands for 10000000 names, more than 1000000", 1),
        ("n[0-99][0-99][0-999]", "with this it stands for 10000000 names, more than 1000000", 13),
        ("n[1-600000],m[1-600000]", "with this it names more than 1000000 nodes", 12),
        ("a,b/c", "`/` cannot be in a node's name", 3),
        ("n1\nn2", "a line ends here; a name cannot go on", 2),
        ("a..b", "a name has no `..`", 1),
        ("..", "a name begins with a letter or a digit", 0),
        ("-x", "a name begins with a letter or a digit", 0),
        ("n1,", "a set is missing at the end", 3),
        ("n1,,n2", "a set is missing before `,`", 3),
        ("!n2", "nothing is before `!` to take it from", 0),
        ("n1!", "a set is missing at the end", 3),
        ("n[]", "a number is missing here", 2),
        ("n[1,]", "a number is missing here", 4),
        ("n[a]", "`a` is no part of a number", 2),
        ("n[1-2/0]", "a step of 0 has no end", 6),
        ("n[1-02]", "`1` and `02` have not as many digits", 2),
        ("n[-3]", "a number is missing here", 2),
        ("n]", "this bracket was never opened", 1),
        ("(n1", "this parenthesis is not closed", 0),
        ("n1)", "this parenthesis was never opened", 2),
        ("n[1[2]]", "this bracket is not closed", 1),
        ("n[1-1234567890123456789]", "a number of more than 17 digits", 4),
        ("@", "the name of a group is missing", 1),
        ("@:x", "the name of a source of groups, such as `slurm`, is missing", 1),
        ("=x", "the name of an attribute is missing", 0),
        ("a=\"b", "this quote is not closed", 2),
        ("n*", "`*` cannot be in a node's name", 1),
        ("nö", "`ö` cannot be in a node's name", 1),
        ("n\u{1b}[1m", "`\\u{1b}` cannot be in a node's name", 1),
    ] {
        assert_eq!(said(text), (what.to_owned(), at), "{text:?}");
    }
    let long = "x".repeat(300);
    assert_eq!(said(&long).0, "a name of 300 letters, more than 253");
    let far = format!("{}n/,{}", "n1,".repeat(100), "n2,".repeat(100));
    // Of a long text only what is around the place.
    let report = parse(&far).unwrap_err().report();
    assert!(report.lines().all(|line| line.chars().count() < 110), "{report}");
    let (text, mark) = (report.lines().nth(2).unwrap(), report.lines().nth(3).unwrap());
    assert_eq!(text.chars().nth(mark.chars().position(|it| it == '^').unwrap()), Some('/'));
    assert!(parse(&"(".repeat(100_000)).is_err());
    assert!(parse(&format!("@g[1-{}]", 999_999)).is_err());
}

#[test]
fn what_may_be_a_name_is_one_rule() {
    for good in ["n1", "a.b-c_d", "0", "A"] {
        name::check(good).unwrap();
    }
    let long = "n".repeat(254);
    for bad in ["", "all", "a/b", "a\nb", "..", "a..b", "a.", "-a", &long, "a b", "é", "a,b"] {
        assert!(name::check(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn sets_know_their_members_and_split_evenly() {
    let nodes = set("r[1-3]u[01-10],login,n[5,007]").unwrap();
    assert_eq!(nodes.len(), 33);
    for name in nodes.names() {
        assert!(nodes.contains(&name), "{name}");
    }
    for other in ["r1u1", "r1", "r4u01", "n7", "n05", "logi", "", "login1"] {
        assert!(!nodes.contains(other), "{other}");
    }
    let parts = nodes.split(4);
    assert_eq!(parts.iter().map(NodeSet::len).collect::<Vec<_>>(), [9, 8, 8, 8]);
    assert_eq!(parts.iter().flat_map(NodeSet::names).collect::<Vec<_>>(), nodes.names());
    assert_eq!(set("n[1-2]").unwrap().split(5).len(), 2);
}

#[test]
fn more_than_a_million_are_refused_however_they_come() {
    let flat: Vec<Number> = (0..MAX_NAMES as u64).map(Number::plain).collect();
    let shapes = HashMap::from([("n#".to_owned(), Rows { width: 1, flat })]);
    let mut builder = Builder { shapes, rows: MAX_NAMES, ..Builder::default() };
    let most = builder.clone().finish().unwrap();
    assert_eq!(most.len(), MAX_NAMES);
    let mut more = builder.clone();
    more.add("m").unwrap();
    assert_eq!(
        more.finish().unwrap_err().to_string(),
        "these are 1000001 nodes, more than 1000000"
    );
    builder.add_set(&most).unwrap();
    assert!(builder.add("m").is_err());
    // The same again is no more, and is not kept twice for ever.
    let flat = vec![Number::plain(7); 2 * MAX_NAMES];
    let shapes = HashMap::from([("n#".to_owned(), Rows { width: 1, flat })]);
    let mut builder = Builder { shapes, rows: 2 * MAX_NAMES, ..Builder::default() };
    builder.add("n7").unwrap();
    assert_eq!(builder.rows, 1);
}

#[test]
fn lines_are_sets_with_comments() {
    let text = "\u{feff}# head\nn1\n  n[2-3] # two\n\n#\nn4!n4,n5\r\n";
    let lines = lines::read(text, "`x`").unwrap();
    assert_eq!(lines.names.finish().unwrap().to_string(), "n1");
    assert_eq!(lines.exprs.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [3, 6]);
    let report = lines::read("n1\n\nn[2\n", "`x`").unwrap_err().report();
    assert!(report.starts_with("error: reading line 3 of `x`\n  because: `n[2` is no set"));
}
