//! Dates of the proleptic Gregorian calendar, in seconds since 1970-01-01 00:00:00.

/// Seconds in a day.
pub(crate) const DAY: i64 = 86_400;
/// Days in 400 years, after which the calendar repeats.
const ERA: i64 = 146_097;

/// A date and time. The fields may be any: a guest writes them one by one, and what it has written may be no date yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Date {
    /// 0 to 9999, century included.
    pub(crate) year: u16,
    /// 1 to 12.
    pub(crate) month: u8,
    /// 1 to 31.
    pub(crate) day: u8,
    /// 0 to 23.
    pub(crate) hour: u8,
    /// 0 to 59.
    pub(crate) minute: u8,
    /// 0 to 59.
    pub(crate) second: u8,
}

impl Date {
    /// The date of so many seconds. Years outside 0 to 9999 come out as the nearest of them.
    pub(crate) fn from_seconds(seconds: i64) -> Self {
        let (days, second) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        // Years are counted from March here, so that the leap day is the last of its year.
        let days = days + 719_468;
        let (era, day_of_era) = (days.div_euclid(ERA), days.rem_euclid(ERA));
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / (ERA - 1)) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let small = |value: i64| u8::try_from(value).unwrap_or(0);
        Self {
            year: u16::try_from(year.clamp(0, 9999)).unwrap_or(0),
            month: small(month),
            day: small(day_of_year - (153 * shifted_month + 2) / 5 + 1),
            hour: small(second / 3600),
            minute: small(second / 60 % 60),
            second: small(second % 60),
        }
    }

    /// The seconds of this date. Fields past their end carry into the next one: the 31st of April is the 1st of May.
    pub(crate) fn to_seconds(self) -> i64 {
        let months = i64::from(self.year) * 12 + i64::from(self.month) - 1;
        let (year, month) = (months.div_euclid(12), months.rem_euclid(12) + 1);
        let year = if month <= 2 { year - 1 } else { year };
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let shifted_month = if month > 2 { month - 3 } else { month + 9 };
        let day_of_year = (153 * shifted_month + 2) / 5 + i64::from(self.day) - 1;
        let days =
            era * ERA + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468;
        days * DAY + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }

    /// The day of the week: 1 is Sunday.
    pub(crate) fn weekday(self) -> u8 {
        // 1970-01-01 was a Thursday.
        u8::try_from((self.to_seconds().div_euclid(DAY) + 4).rem_euclid(7) + 1).unwrap_or(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn date(year: u16, month: u8, day: u8) -> Date {
        Date { year, month, day, hour: 0, minute: 0, second: 0 }
    }

    #[test]
    fn every_day_of_ten_thousand_years_survives_the_round_trip_and_follows_the_one_before() {
        let first = date(0, 1, 1).to_seconds();
        let last = date(9999, 12, 31).to_seconds();
        assert_eq!((last - first) / DAY, 25 * ERA - 1);
        let mut before = Date::from_seconds(first);
        for seconds in (first + DAY..=last).step_by(86_400) {
            let today = Date::from_seconds(seconds);
            assert_eq!(today.to_seconds(), seconds);
            assert_eq!(today.weekday(), before.weekday() % 7 + 1);
            assert!(today.day == before.day + 1 || today.day == 1 && today.month == before.month % 12 + 1);
            before = today;
        }
    }

    #[test]
    fn known_days_come_out_right() {
        assert_eq!(date(1970, 1, 1).to_seconds(), 0);
        assert_eq!(date(2000, 2, 29).to_seconds(), 951_782_400);
        assert_eq!(date(2000, 2, 29).weekday(), 3);
        assert_eq!(
            Date::from_seconds(4_107_542_399),
            Date { hour: 23, minute: 59, second: 59, ..date(2100, 2, 28) }
        );
        assert_eq!(Date::from_seconds(4_107_542_400), date(2100, 3, 1));
    }

    #[test]
    fn a_day_past_the_end_of_its_month_is_one_of_the_next() {
        assert_eq!(Date::from_seconds(date(2026, 4, 31).to_seconds()), date(2026, 5, 1));
        assert_eq!(Date::from_seconds(date(2025, 13, 1).to_seconds()), date(2026, 1, 1));
    }
}
