//! `cargo xtask deps`: dependencies point the way that DESIGN.md says.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::process::{capture, cargo};
use crate::tree;

/// Which packages of the workspace the packages in a folder may use. The first rule that fits a package is its own.
const RULES: [(&str, Allowed); 18] = [
    ("core/machine", Allowed::These { code: &[], tests: &[] }),
    ("core/soft/fp", Allowed::These { code: &[], tests: &[] }),
    ("core/soft", Allowed::These { code: &["tenon-core", "tenon-soft-fp"], tests: &["tenon-platform"] }),
    ("core/kvm", Allowed::These { code: &["tenon-core"], tests: &[] }),
    ("sdk/abi", Allowed::These { code: &[], tests: &[] }),
    ("sdk/rust", Allowed::These { code: &["tenon-abi"], tests: &["tenon-testkit"] }),
    // Folders on the bench are those of the host.
    ("sdk/testkit", Allowed::These { code: &["tenon-abi", "tenon-sdk", "tenon-folder"], tests: &[] }),
    ("sdk/tool", Allowed::These { code: &[], tests: &[] }),
    ("devices/platform", Allowed::These { code: &["tenon-core"], tests: &[] }),
    // Bundled plugins use what a vendor could use.
    ("devices", Allowed::These { code: &["tenon-sdk"], tests: &["tenon-testkit"] }),
    ("plugins/personalities", Allowed::These { code: &["tenon-sdk"], tests: &["tenon-testkit"] }),
    ("plugins/stores", Allowed::These { code: &["tenon-sdk"], tests: &["tenon-testkit"] }),
    ("plugins/folder", Allowed::These { code: &["tenon-abi"], tests: &[] }),
    ("plugins/net", Allowed::These { code: &["tenon-core"], tests: &[] }),
    (
        "plugins/host",
        Allowed::These {
            code: &["tenon-core", "tenon-abi", "tenon-folder"],
            tests: &["tenon-plugin-tool", "tenon-soft"],
        },
    ),
    // Whole-system tests know the product by its command only.
    ("tests", Allowed::These { code: &[], tests: &[] }),
    ("xtask", Allowed::These { code: &["tenon-plugin-tool"], tests: &[] }),
    // The only place where everything is put together.
    ("cli", Allowed::All),
];

#[derive(Clone, Copy)]
enum Allowed {
    All,
    These { code: &'static [&'static str], tests: &'static [&'static str] },
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    manifest_path: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// `None` for normal ones, else `dev` or `build`.
    kind: Option<String>,
    /// Set for packages of this repository.
    path: Option<String>,
}

/// Checks every package of the workspace, and the example plugins.
///
/// # Errors
/// A dependency points the wrong way, or a package has no rule.
pub(crate) fn run() -> Result<()> {
    let text = capture(cargo().args(["metadata", "--no-deps", "--offline", "--format-version", "1"]))?;
    let metadata: Metadata = serde_json::from_str(&text).context("cannot read cargo's metadata")?;
    let mut wrong = Vec::new();
    let mut seen = BTreeMap::new();
    for package in &metadata.packages {
        let folder = Path::new(&package.manifest_path).parent().unwrap_or(Path::new(""));
        let folder = folder.strip_prefix(tree::root()).unwrap_or(folder);
        let Some((place, allowed)) = RULES.iter().find(|(place, _)| folder.starts_with(place)) else {
            wrong.push(format!("{} in {}: no rule says what it may use", package.name, folder.display()));
            continue;
        };
        *seen.entry(*place).or_insert(0) += 1;
        wrong.extend(
            package.dependencies.iter().filter_map(|dependency| violation(package, dependency, *allowed)),
        );
    }
    if !wrong.is_empty() {
        bail!("dependencies that DESIGN.md forbids:\n  {}", wrong.join("\n  "));
    }
    println!("deps: {} packages use only what they may", seen.values().sum::<usize>());
    Ok(())
}

fn violation(package: &Package, dependency: &Dependency, allowed: Allowed) -> Option<String> {
    let Allowed::These { code, tests } = allowed else { return None };
    dependency.path.as_ref()?;
    let name = dependency.name.as_str();
    let for_tests = dependency.kind.as_deref() == Some("dev");
    if code.contains(&name) || for_tests && tests.contains(&name) {
        return None;
    }
    let what = if for_tests { "in its tests" } else { "in its code" };
    let may = if code.is_empty() { "nothing of the workspace".to_owned() } else { code.join(", ") };
    Some(format!("{} uses {name} {what}; it may use {may}", package.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uses(package: &str, dependency: &str, kind: Option<&str>, allowed: Allowed) -> Option<String> {
        let package =
            Package { name: package.into(), manifest_path: String::new(), dependencies: Vec::new() };
        let dependency =
            Dependency { name: dependency.into(), kind: kind.map(Into::into), path: Some(String::new()) };
        violation(&package, &dependency, allowed)
    }

    #[test]
    fn a_device_may_use_the_sdk_and_nothing_else() {
        let device = RULES.iter().find(|(place, _)| *place == "devices").unwrap().1;
        assert_eq!(uses("serial", "tenon-sdk", None, device), None);
        assert_eq!(uses("serial", "tenon-testkit", Some("dev"), device), None);
        assert!(uses("serial", "tenon-testkit", None, device).is_some());
        assert!(uses("serial", "tenon-core", None, device).unwrap().contains("tenon-core"));
    }
}
