//! The list of all workloads as the documentation has it.

use super::AREAS;

const BEGIN: &str = "<!-- The list of workloads: made by selfcheck list --docs, not by hand. -->\n";
const END: &str = "<!-- End of the list of workloads. -->\n";

/// A page with the list in the place that it has there. `None` if it has no place for it.
pub fn refreshed(page: &str) -> Option<String> {
    let begin = page.find(BEGIN)? + BEGIN.len();
    let end = begin + page.get(begin..)?.find(END)?;
    Some(format!("{}{}{}", page.get(..begin)?, list(), page.get(end..)?))
}

fn list() -> String {
    let count = AREAS.iter().map(|area| area.workloads.len()).sum::<usize>();
    let mut text = format!("There are {count}.\n");
    for area in AREAS {
        text += &format!("\n| {} | |\n|---|---|\n", area.name);
        for workload in area.workloads {
            text += &format!("| `{}` | {} |\n", workload.name, workload.about);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_list_is_made_anew() {
        let page = format!("# Page\n{BEGIN}outdated\n{END}rest\n");
        let new = refreshed(&page).unwrap();
        assert!(new.starts_with("# Page\n") && new.ends_with("rest\n"), "{new}");
        assert!(new.contains("| `pipes` |") && !new.contains("outdated"), "{new}");
        assert_eq!(refreshed(&new).as_ref(), Some(&new));
        assert_eq!(refreshed("# Page\n"), None);
    }
}
