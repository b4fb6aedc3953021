//! Dates in chat templates: `strftime_now("%d %b %Y")`, as Python's `strftime` writes them. In UTC.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// The time now, formatted.
///
/// # Errors
/// The first directive that is not known here.
pub(crate) fn strftime_now(format: &str) -> Result<String, String> {
    // A clock before 1970 has lost its battery.
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    strftime(format, now.map_or(0, |now| now.as_secs()))
}

/// The time `seconds` after 1970-01-01 00:00 UTC.
fn strftime(format: &str, seconds: u64) -> Result<String, String> {
    let date = Date::new(seconds);
    let (hour, minute) = (seconds / 3600 % 24, seconds / 60 % 60);
    let hour12 = (hour + 11) % 12 + 1;
    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            text.push(char);
            continue;
        }
        let mut directive = chars.next();
        // `%-d`: without the leading zero.
        let bare = directive == Some('-');
        if bare {
            directive = chars.next();
        }
        let two = |number: u64| match bare {
            true => number.to_string(),
            false => format!("{number:02}"),
        };
        text += &match directive {
            Some('Y') => date.year.to_string(),
            Some('y') => two(date.year % 100),
            Some('m') => two(date.month),
            Some('B') => MONTHS[date.month as usize - 1].to_string(),
            Some('b' | 'h') => MONTHS[date.month as usize - 1][..3].to_string(),
            Some('d') => two(date.day),
            Some('e') => format!("{:2}", date.day),
            Some('j') if bare => date.day_of_year.to_string(),
            Some('j') => format!("{:03}", date.day_of_year),
            Some('A') => DAYS[date.weekday].to_string(),
            Some('a') => DAYS[date.weekday][..3].to_string(),
            Some('H') => two(hour),
            Some('I') => two(hour12),
            Some('M') => two(minute),
            Some('S') => two(seconds % 60),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_string(),
            Some('F') => format!("{}-{:02}-{:02}", date.year, date.month, date.day),
            Some('T') => format!("{hour:02}:{minute:02}:{:02}", seconds % 60),
            Some('Z') => "UTC".to_string(),
            Some('z') => "+0000".to_string(),
            Some('%') => "%".to_string(),
            Some(other) => {
                return Err(format!("strftime_now: the directive `%{other}` is unknown"));
            }
            None => return Err("strftime_now: the format ends in `%`".to_string()),
        };
    }
    Ok(text)
}

struct Date {
    year: u64,
    /// 1 to 12.
    month: u64,
    /// 1 to 31.
    day: u64,
    /// 1 to 366.
    day_of_year: u64,
    /// 0 is Sunday.
    weekday: usize,
}

impl Date {
    fn new(seconds: u64) -> Self {
        let days = seconds / 86_400;
        let (mut year, mut left) = (1970, days);
        while left >= days_of(year) {
            left -= days_of(year);
            year += 1;
        }
        let day_of_year = left + 1;
        let february = days_of(year) - 337;
        let mut month = 1;
        for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
            if left < length {
                break;
            }
            left -= length;
            month += 1;
        }
        Self {
            year,
            month,
            day: left + 1,
            day_of_year,
            // The first of January 1970 was a Thursday.
            weekday: ((days + 4) % 7) as usize,
        }
    }
}

fn days_of(year: u64) -> u64 {
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    365 + u64::from(leap)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_that_python_agrees_with() {
        for (seconds, format, text) in [
            (0, "%d %b %Y %a %j", "01 Jan 1970 Thu 001"),
            (951_782_399, "%F %T", "2000-02-28 23:59:59"),
            (951_782_400, "%A, %B %e, %Y", "Tuesday, February 29, 2000"),
            (978_220_800, "%F %j", "2000-12-31 366"),
            (1_735_603_506, "%d/%m/%y %I:%M %p", "31/12/24 12:05 AM"),
            (1_741_356_000, "%-d %-m %-I%p %%", "7 3 2PM %"),
            (4_107_542_400, "%F %a", "2100-03-01 Mon"),
        ] {
            assert_eq!(strftime(format, seconds).unwrap(), text, "{seconds}");
        }
    }

    #[test]
    fn unknown_directives_are_named() {
        assert!(strftime("%d %Q", 0).unwrap_err().contains("%Q"));
        assert!(strftime("100%", 0).unwrap_err().contains("ends"));
    }
}
