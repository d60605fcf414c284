//! The tables of the embedded store, and opening its file safely.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use nix::sys::statfs::statfs;
use rusqlite::{Connection, OpenFlags};

use crate::error::{Context, Error, Result};

/// The shape of the tables; a newer one is refused.
const VERSION: i64 = 1;
/// How long to wait for another writer, each of whose commits takes a millisecond.
const BUSY_LIMIT: Duration = Duration::from_secs(10);

/// File systems that other machines see too, where SQLite's locks and shared memory do
/// not work (magic numbers of statfs(2) and linux/magic.h).
const NETWORK_FILE_SYSTEMS: &[(i64, &str)] = &[
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB2"),
    (0x0bd0_0bd0, "Lustre"),
    (0x4750_4653, "GPFS"),
    (0x5346_414f, "AFS"),
    (0x00c3_6400, "Ceph"),
    (0x0102_1997, "9P"),
    (0x7461_636f, "OCFS2"),
    (0x0116_1970, "GFS2"),
    (0x1980_3532, "BeeGFS"),
];

/// The name of the network file system with this magic number, if it is one. FUSE is
/// taken for local: it hides what is behind it, and often that is a local disk.
pub(super) fn network_file_system(magic: i64) -> Option<&'static str> {
    NETWORK_FILE_SYSTEMS.iter().find(|(number, _)| *number == magic).map(|(_, name)| *name)
}

/// The network file system `path` lies on, if it does.
pub(super) fn network_file_system_of(path: &Path) -> Result<Option<&'static str>> {
    let found = statfs(path).while_doing(|| format!("looking at `{}`", path.display()))?;
    // The kernel's numbers are 32 bits, whatever their type here.
    Ok(network_file_system(found.filesystem_type().0 as i64 & 0xffff_ffff))
}

/// Makes the directory, ours alone, or makes sure that it is.
pub(super) fn private_dir(dir: &Path) -> Result<()> {
    let doing = || format!("opening the store in `{}`", dir.display());
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).while_doing(doing)?;
    let found = fs::symlink_metadata(dir).while_doing(doing)?;
    let refuse = |why: &str| {
        Err(Error::system(why.to_owned())
            .help("move it away, or name another directory with PAVO_STATE_DIR"))
        .while_doing(doing)
    };
    if !found.is_dir() {
        return refuse("it is not a directory");
    }
    if found.uid() != nix::unistd::geteuid().as_raw() {
        return refuse("it belongs to somebody else");
    }
    if found.permissions().mode() & 0o022 != 0 {
        return refuse("others may write to it");
    }
    if let Some(name) = network_file_system_of(dir)? {
        return refuse(&format!("it lies on {name}, where SQLite's locks do not work"));
    }
    Ok(())
}

/// Opens the store's file; without `create`, `None` if there is none.
pub(super) fn connect(dir: &Path, create: bool) -> Result<Option<Connection>> {
    let file = dir.join("store.db");
    if !create && !file.exists() {
        return Ok(None);
    }
    private_dir(dir)?;
    let mut flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    if create {
        flags |= OpenFlags::SQLITE_OPEN_CREATE;
    }
    let doing = || format!("opening the store `{}`", file.display());
    let connection =
        Connection::open_with_flags(&file, flags).map_err(explain).while_doing(doing)?;
    prepare(&connection).while_doing(doing)?;
    Ok(Some(connection))
}

fn prepare(connection: &Connection) -> Result<()> {
    connection.busy_timeout(BUSY_LIMIT).map_err(explain)?;
    // 256 KiB of cache are enough for lists of thousands. WAL with NORMAL is safe against
    // crashes of processes; a crash of the machine ends all jobs anyhow.
    connection
        .execute_batch("PRAGMA cache_size = -256; PRAGMA synchronous = NORMAL;")
        .map_err(explain)?;
    let version: i64 =
        connection.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(explain)?;
    match version {
        VERSION => Ok(()),
        0 => create_tables(connection),
        newer => {
            Err(Error::system(format!("it has the shape {newer}, this version knows {VERSION}"))
                .help("use the newer pavo that wrote it, or another PAVO_STATE_DIR"))
        }
    }
}

fn create_tables(connection: &Connection) -> Result<()> {
    connection.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(())).map_err(explain)?;
    connection
        .execute_batch(&format!(
            "BEGIN IMMEDIATE;
             CREATE TABLE IF NOT EXISTS entries (
                 key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL,
                 created INTEGER NOT NULL, lease INTEGER) WITHOUT ROWID;
             CREATE INDEX IF NOT EXISTS leased ON entries (lease) WHERE lease IS NOT NULL;
             CREATE TABLE IF NOT EXISTS changes (
                 revision INTEGER NOT NULL, number INTEGER NOT NULL, key TEXT NOT NULL,
                 value BLOB, created INTEGER, lease INTEGER,
                 PRIMARY KEY (revision, number)) WITHOUT ROWID;
             CREATE TABLE IF NOT EXISTS leases (
                 id INTEGER PRIMARY KEY AUTOINCREMENT, boot TEXT NOT NULL,
                 ttl INTEGER NOT NULL, expires INTEGER NOT NULL);
             CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
             INSERT OR IGNORE INTO counters VALUES ('revision', 0), ('pruned', 0);
             PRAGMA user_version = {VERSION};
             COMMIT;"
        ))
        .map_err(explain)
}

/// Says what a SQLite error means to the user.
pub(super) fn explain(error: rusqlite::Error) -> Error {
    use rusqlite::ErrorCode::{DatabaseBusy, DatabaseCorrupt, DiskFull, NotADatabase, ReadOnly};
    let help = match error.sqlite_error_code() {
        Some(DiskFull) => "the disk is full: make room, or set PAVO_STATE_DIR elsewhere",
        Some(DatabaseCorrupt | NotADatabase) => {
            "the file is damaged: end your jobs, then move it away; pavo makes a new one"
        }
        Some(DatabaseBusy) => "another process holds it: is one of yours stopped (Ctrl-Z)?",
        Some(ReadOnly) => "the file or its directory cannot be written to",
        _ => return Error::system("the store failed").because(error),
    };
    Error::system("the store failed").because(error).help(help)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_file_systems_are_known_and_local_ones_are_not_taken_for_them() {
        assert_eq!(network_file_system(0x6969), Some("NFS"));
        assert_eq!(network_file_system(0xff53_4d42), Some("CIFS"));
        for local in [0xef53, 0x0102_1994, 0x5846_5342, 0x9123_683e, 0x6573_5546] {
            assert_eq!(network_file_system(local), None, "{local:x}");
        }
    }

    #[test]
    fn a_directory_others_can_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        let report = connect(&path, true).unwrap_err().report();
        assert!(report.contains("others may write to it"), "{report}");
    }

    #[test]
    fn a_store_of_a_newer_version_and_a_damaged_one_are_refused_with_help() {
        let dir = tempfile::tempdir().unwrap();
        let store = connect(dir.path(), true).unwrap().unwrap();
        store.execute_batch("PRAGMA user_version = 99").unwrap();
        drop(store);
        let report = connect(dir.path(), true).unwrap_err().report();
        assert!(report.contains("it has the shape 99"), "{report}");
        fs::write(dir.path().join("store.db"), [b'x'; 8192]).unwrap();
        let report = connect(dir.path(), true).unwrap_err().report();
        assert!(report.contains("help: the file is damaged"), "{report}");
    }
}
