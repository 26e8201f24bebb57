/*
 * The file worker: file operations inside the sandbox, for the daemon.
 *
 * Theory of operation
 * ===================
 *
 * A worker is forked from init and is given one end of a SOCK_SEQPACKET pair; the daemon holds the other. It runs as
 * the sandbox's user in the sandbox's mount namespace, so a path means here what it means to a command, and nothing
 * can be reached that a command could not reach. One datagram is one message (the table is in files_wire.py); one
 * request is served at a time, and answered before the next is read. Nothing is allocated: temporary files,
 * listings and watches have a bounded number of places, each under a token that the daemon quotes.
 *
 * Its life. Whoever holds the other end owns the worker: end of file ends it, and init, which sees that end too,
 * kills it if a system call holds it up (a hung network file system). A command can kill it like any process of its
 * own uid; the daemon then sees end of file and asks for another. So nothing here is worth keeping: a temporary
 * file has no name until it is committed, where the file system can do that, and is unlinked at the end otherwise.
 *
 * Hostile trees. A command may change any path at any moment, to its own harm only, but it must not block or crash
 * us. Files are opened non-blocking, which for a FIFO, a device or a lease means: at once or not at all. What leaves
 * is a regular file: no directory, from which `..` leads on, and no file of procfs, sysfs and their like, whose
 * contents are the kernel's answer to whoever reads or writes, and that would be the daemon. Trees are walked by
 * descriptor without following links, in loops with bounded depth, never by recursion.
 *
 * Listings are a cursor with one open directory per level, and a page per request. Where a page is full, or has
 * taken its time, the position in the directory is set back to the first entry not sent. With a watch, a directory
 * is watched before it is read: what appears later is an event, what was there before is in the listing.
 *
 * Removal goes down at most REMOVE_LEVELS directories. What lies deeper is moved up into the directory that is being
 * removed, where the loop finds it again, so depth costs neither descriptors nor memory. It stops after its time
 * and says that there is more: the daemon asks again, and may as well not.
 *
 * The working directory is /proc, because inotify and chmod have no call that takes a descriptor of O_PATH: they
 * get "self/fd/N".
 */

#define _GNU_SOURCE

#include "files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "message.h"

enum {
    REQUEST_BYTES_MAX = 16 * 1024, /* three paths and what goes with them */
    PATH_LENGTH_MAX = 4095,        /* the kernel's PATH_MAX, less its NUL */
    NAME_LENGTH_MAX = 255,
    LINKS_MAX = 40, /* as the kernel */
    TEMPS_MAX = 64,
    CURSORS_MAX = 8,
    WATCHES_MAX = 16,
    DEPTH_MAX = 64,
    REMOVE_LEVELS = 32,
    TURN_MS = 50,                               /* of a listing or a removal, until it lets others in */
    ENTRY_BYTES_MAX = 2 * PATH_LENGTH_MAX + 128 /* a path, a link's target, and what goes with them */
};

#define MAGIC 0x4653U /* "SF" */

enum type {
    OPEN = 0x0001,
    STAT = 0x0002,
    LIST = 0x0003,
    LIST_NEXT = 0x0004,
    CLOSE = 0x0005,
    MAKE_DIR = 0x0006,
    RENAME = 0x0007,
    REMOVE = 0x0008,
    SYMLINK = 0x0009,
    CHMOD = 0x000a,
    SET_TIMES = 0x000b,
    TEMP = 0x000c,
    COMMIT = 0x000d,
    WATCH = 0x000e,
    UNWATCH = 0x000f,
    REPLY = 0x8000,
    ERROR = 0xffff
};

/* Flags mean the same in every request that knows them. */
enum {
    FOLLOW = 1U << 0,
    PARENTS = 1U << 1,
    READ = 1U << 2,
    WRITE = 1U << 3,
    CREATE = 1U << 4,
    EXCLUSIVE = 1U << 5,
    TRUNCATE = 1U << 6,
    APPEND = 1U << 7,
    DIRECTORIES_ONLY = 1U << 8,
    RECURSIVE = 1U << 9,
    NO_REPLACE = 1U << 10,
    EXCHANGE = 1U << 11,
    KEEP_MODE = 1U << 12
};

enum { PAGE_CUT = 1U << 0 };

#define WATCHED                                                                                                  \
    (IN_CREATE | IN_DELETE | IN_MODIFY | IN_CLOSE_WRITE | IN_ATTRIB | IN_MOVED_FROM | IN_MOVED_TO | IN_DELETE_SELF | \
     IN_MOVE_SELF | IN_EXCL_UNLINK)

struct temp {
    uint32_t token; /* 0: free */
    int directory;
    int file; /* without a name so far; -1: it has the hidden one */
    char name[NAME_LENGTH_MAX + 1];
    char hidden[32];
};

struct cursor {
    uint32_t token; /* 0: free */
    uint32_t flags;
    int inotify; /* of the watch that it adds to, which closes it; -1: none */
    int depth_max;
    int level; /* of the directory being read, below 0: at the end */
    bool cut;  /* something was left out */
    int directories[DEPTH_MAX];
    size_t lengths[DEPTH_MAX]; /* of the path of each */
    char path[PATH_LENGTH_MAX + 1];
};

struct watch {
    uint32_t token; /* 0: free */
    int inotify;
};

static struct temp temps[TEMPS_MAX];
static struct cursor cursors[CURSORS_MAX];
static struct watch watches[WATCHES_MAX];
static uint32_t last_token;

static int peer_fd = -1;
static uint32_t asked_type;
static uint32_t asked_id;
static unsigned char inbox[REQUEST_BYTES_MAX];
static char link_targets[2][PATH_LENGTH_MAX + 1];
static uint64_t turn_ends_ns;

struct directory_entry {
    uint64_t inode;
    int64_t offset;
    unsigned short length;
    unsigned char type;
    char name[];
};

/* ---- leaves ------------------------------------------------------------------------------------------- */

static uint64_t now_ns(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

static void begin_turn(void)
{
    turn_ends_ns = now_ns() + (uint64_t)TURN_MS * UINT64_C(1000000);
}

static bool turn_over(void)
{
    return now_ns() >= turn_ends_ns;
}

static void close_quietly(int fd)
{
    int error = errno;
    if (fd >= 0)
        (void)close(fd);
    errno = error;
}

static uint32_t new_token(void)
{
    last_token = last_token == UINT32_MAX ? 1 : last_token + 1;
    return last_token;
}

/* The name of one of our descriptors below /proc, our working directory. */
struct own_path {
    char text[24];
};

static struct own_path own_path(int fd)
{
    struct own_path path;
    (void)snprintf(path.text, sizeof path.text, "self/fd/%d", fd);
    return path;
}

static bool is_dot(const char *name)
{
    return name[0] == '.' && (name[1] == 0 || (name[1] == '.' && name[2] == 0));
}

/* For names that exist for a moment, beside those that others chose. */
static void hide_name(char *name, size_t size)
{
    uint64_t chance = 0;
    (void)!getrandom(&chance, sizeof chance, GRND_NONBLOCK);
    (void)snprintf(name, size, ".sandbox-%016jx", (uintmax_t)chance);
}

static bool is_kernels_own(int fd)
{
    struct statfs system;
    if (fstatfs(fd, &system) != 0)
        return true;
    switch ((uint32_t)system.f_type) {
    case PROC_SUPER_MAGIC:
    case SYSFS_MAGIC:
    case CGROUP_SUPER_MAGIC:
    case CGROUP2_SUPER_MAGIC:
    case DEBUGFS_MAGIC:
    case TRACEFS_MAGIC:
    case SECURITYFS_MAGIC:
    case SELINUX_MAGIC:
    case SMACK_MAGIC:
    case BPF_FS_MAGIC:
    case EFIVARFS_MAGIC:
    case PSTOREFS_MAGIC:
    case NSFS_MAGIC:
    case BINFMTFS_MAGIC:
        return true;
    default:
        return false;
    }
}

/* ---- answers ------------------------------------------------------------------------------------------ */

static _Noreturn void leave(void)
{
    for (size_t i = 0; i < TEMPS_MAX; i++)
        if (temps[i].token != 0 && temps[i].file < 0)
            (void)unlinkat(temps[i].directory, temps[i].hidden, 0);
    _exit(0);
}

static void begin_reply(void)
{
    begin_message(MAGIC, REPLY | asked_type, asked_id);
}

/* `kind` is the type of a thing that is in the way of what was asked for, as in st_mode, or 0. */
static void refuse_kind(int error, mode_t kind)
{
    begin_message(MAGIC, ERROR, asked_id);
    put((uint32_t)error, 4);
    put(kind & S_IFMT, 4);
    if (send_message(peer_fd, -1, 0) != 0)
        leave();
}

static void refuse(int error)
{
    refuse_kind(error, 0);
}

static void answer(void)
{
    if (send_message(peer_fd, -1, 0) != 0)
        leave();
}

/* False: the descriptor could not be passed (too many are under way), and this was said instead. */
static bool answer_with(int descriptor)
{
    if (send_message(peer_fd, descriptor, 0) == 0)
        return true;
    if (errno != ETOOMANYREFS && errno != ENOMEM && errno != ENOBUFS)
        leave();
    refuse(errno);
    return false;
}

/* For calls that return 0, or -1 and errno. */
static void acknowledge(int result)
{
    if (result != 0) {
        refuse(errno);
        return;
    }
    begin_reply();
    answer();
}

static void put_facts(const struct stat *facts)
{
    put(facts->st_mode, 4);
    put((uint64_t)facts->st_nlink > UINT32_MAX ? UINT32_MAX : (uint32_t)facts->st_nlink, 4);
    put(facts->st_uid, 4);
    put(facts->st_gid, 4);
    put((uint64_t)facts->st_size, 8);
    put((uint64_t)facts->st_blocks * 512, 8);
    put((uint64_t)facts->st_mtim.tv_sec, 8);
    put((uint64_t)facts->st_ctim.tv_sec, 8);
    put((uint32_t)facts->st_mtim.tv_nsec, 4);
    put((uint32_t)facts->st_ctim.tv_nsec, 4);
    put(facts->st_ino, 8);
    put(facts->st_dev, 8);
}

static void put_target(int directory, const char *name, mode_t mode)
{
    ssize_t length = 0;
    if (S_ISLNK(mode))
        length = readlinkat(directory, name, link_targets[0], PATH_LENGTH_MAX);
    put_string(link_targets[0], length > 0 ? (size_t)length : 0);
}

/* ---- paths -------------------------------------------------------------------------------------------- */

static int enter(int directory, const char *path)
{
    return openat(directory, path, O_PATH | O_DIRECTORY | O_CLOEXEC);
}

/* Where relative paths start. */
static int open_base(const char *base)
{
    if (*base != '/') {
        errno = EINVAL;
        return -1;
    }
    return enter(AT_FDCWD, base);
}

/* The directory `path`, made where it is missing, its last one with `mode`. Open, or -1. */
static int make_directories(int base, char *path, mode_t mode, bool *created)
{
    int at = enter(base, *path == '/' ? "/" : ".");
    for (path += strspn(path, "/"); at >= 0 && *path != 0;) {
        size_t length = strcspn(path, "/");
        size_t slashes = strspn(path + length, "/");
        bool last = path[length + slashes] == 0;
        char after = path[length];
        path[length] = 0;
        int next = enter(at, path);
        if (next < 0 && errno == ENOENT) {
            *created = mkdirat(at, path, last ? mode : 0755) == 0;
            if (*created || errno == EEXIST)
                next = enter(at, path);
            *created = *created && last;
        }
        close_quietly(at);
        at = next;
        path[length] = after;
        path += length + slashes;
    }
    return at;
}

/* Opens the directory that the last name of a path is in, and finds that name. The path is cut in two in place. */
static int open_parent(int base, char *path, bool make, char **name)
{
    bool created = false;
    size_t length = strlen(path);
    while (length > 0 && path[length - 1] == '/')
        path[--length] = 0;
    char *slash = strrchr(path, '/');
    *name = slash == NULL ? path : slash + 1;
    if (**name == 0 || is_dot(*name)) {
        errno = EINVAL;
        return -1;
    }
    if (strlen(*name) > NAME_LENGTH_MAX) {
        errno = ENAMETOOLONG;
        return -1;
    }
    if (slash == NULL)
        return enter(base, ".");
    if (slash == path)
        return enter(base, "/");
    *slash = 0;
    int directory = enter(base, path);
    if (directory < 0 && make && errno == ENOENT)
        directory = make_directories(base, path, 0755, &created);
    return directory;
}

/* As open_parent, but of what the last name leads to if it is a link. The name lies in the path or in a buffer. */
static int open_final_parent(int base, char *path, bool make, char **name)
{
    int directory = open_parent(base, path, make, name);
    for (int links = 0; directory >= 0; links++) {
        char *target = link_targets[links % 2];
        ssize_t length = readlinkat(directory, *name, target, PATH_LENGTH_MAX);
        if (length <= 0)
            break;
        target[length] = 0;
        int before = directory;
        errno = ELOOP;
        directory = links < LINKS_MAX ? open_parent(before, target, make, name) : -1;
        close_quietly(before);
    }
    return directory;
}

/* ---- one file ----------------------------------------------------------------------------------------- */

static int open_flags(uint32_t flags)
{
    int given = O_NONBLOCK | O_CLOEXEC | O_NOCTTY;
    given |= (flags & WRITE) == 0 ? O_RDONLY : (flags & READ) == 0 ? O_WRONLY : O_RDWR;
    given |= (flags & CREATE) != 0 ? O_CREAT : 0;
    given |= (flags & EXCLUSIVE) != 0 ? O_EXCL : 0;
    given |= (flags & APPEND) != 0 ? O_APPEND : 0;
    given |= (flags & FOLLOW) == 0 ? O_NOFOLLOW : 0;
    return given;
}

static int open_at(int base, char *path, uint32_t flags, mode_t mode)
{
    int fd = openat(base, path, open_flags(flags), mode);
    if (fd >= 0 || errno != ENOENT || (flags & PARENTS) == 0)
        return fd;
    char *name;
    int directory = open_parent(base, path, true, &name);
    if (directory < 0)
        return -1;
    fd = openat(directory, name, open_flags(flags), mode);
    close_quietly(directory);
    return fd;
}

/* What may leave the sandbox; otherwise the errno that says why not. Truncates, if that was asked for. */
static int judge_opened(int fd, uint32_t flags, struct stat *facts)
{
    if (fstat(fd, facts) != 0)
        return errno;
    if (S_ISDIR(facts->st_mode))
        return EISDIR;
    if (!S_ISREG(facts->st_mode))
        return ENXIO;
    if (is_kernels_own(fd))
        return EOPNOTSUPP;
    if ((flags & TRUNCATE) != 0 && (ftruncate(fd, 0) != 0 || fstat(fd, facts) != 0))
        return errno;
    return 0;
}

static bool makes_sense(uint32_t flags)
{
    return (flags & (READ | WRITE)) != 0 && ((flags & WRITE) != 0 || (flags & (CREATE | TRUNCATE | APPEND)) == 0) &&
           ((flags & CREATE) != 0 || (flags & (EXCLUSIVE | PARENTS)) == 0);
}

static void handle_open(uint32_t flags, int base, struct reader *in)
{
    uint32_t mode = take_u32(in);
    char *path = take_string(in);
    struct stat facts = {.st_mode = 0};
    if (!complete(in) || mode > 07777 || !makes_sense(flags)) {
        refuse(EBADMSG);
        return;
    }
    int fd = open_at(base, path, flags, mode);
    if (fd < 0) {
        refuse(errno);
        return;
    }
    int error = judge_opened(fd, flags, &facts);
    if (error != 0) {
        refuse_kind(error, facts.st_mode);
    } else {
        begin_reply();
        put_facts(&facts);
        (void)answer_with(fd);
    }
    (void)close(fd);
}

static void handle_stat(uint32_t flags, int base, struct reader *in)
{
    const char *path = take_string(in);
    struct stat facts;
    if (!complete(in)) {
        refuse(EBADMSG);
        return;
    }
    if (fstatat(base, path, &facts, AT_NO_AUTOMOUNT | ((flags & FOLLOW) != 0 ? 0 : AT_SYMLINK_NOFOLLOW)) != 0) {
        refuse(errno);
        return;
    }
    begin_reply();
    put_facts(&facts);
    put_target(base, path, facts.st_mode);
    answer();
}

static void handle_chmod(uint32_t flags, int base, struct reader *in)
{
    uint32_t mode = take_u32(in);
    const char *path = take_string(in);
    if (!complete(in) || mode > 07777) {
        refuse(EBADMSG);
        return;
    }
    int fd = openat(base, path, O_PATH | O_CLOEXEC | ((flags & FOLLOW) != 0 ? 0 : O_NOFOLLOW));
    int result = fd < 0 ? -1 : fchmodat(AT_FDCWD, own_path(fd).text, mode, 0);
    acknowledge(result);
    close_quietly(fd);
}

static void handle_set_times(uint32_t flags, int base, struct reader *in)
{
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}};
    times[1].tv_sec = (time_t)take_u64(in);
    uint32_t nanoseconds = take_u32(in);
    const char *path = take_string(in);
    if (!complete(in) || nanoseconds > 999999999) {
        refuse(EBADMSG);
        return;
    }
    times[1].tv_nsec = (long)nanoseconds;
    acknowledge(utimensat(base, path, times, (flags & FOLLOW) != 0 ? 0 : AT_SYMLINK_NOFOLLOW));
}

static void handle_symlink(uint32_t flags, int base, struct reader *in)
{
    const char *target = take_string(in);
    char *path = take_string(in);
    if (!complete(in)) {
        refuse(EBADMSG);
        return;
    }
    char *name;
    int directory = open_parent(base, path, (flags & PARENTS) != 0, &name);
    acknowledge(directory < 0 ? -1 : symlinkat(target, directory, name));
    close_quietly(directory);
}

static void handle_make_dir(uint32_t flags, int base, struct reader *in)
{
    uint32_t mode = take_u32(in);
    char *path = take_string(in);
    bool created = true;
    if (!complete(in) || mode > 07777) {
        refuse(EBADMSG);
        return;
    }
    int result;
    if ((flags & PARENTS) == 0) {
        result = mkdirat(base, path, mode);
    } else {
        created = false;
        int fd = make_directories(base, path, mode, &created);
        result = fd < 0 ? -1 : 0;
        close_quietly(fd);
    }
    if (result != 0) {
        refuse(errno);
        return;
    }
    begin_reply();
    put(created, 4);
    answer();
}

static void handle_rename(uint32_t flags, int base, struct reader *in)
{
    const char *old_path = take_string(in);
    const char *new_path = take_string(in);
    bool no_replace = (flags & NO_REPLACE) != 0;
    bool exchange = (flags & EXCHANGE) != 0;
    if (!complete(in) || (no_replace && exchange)) {
        refuse(EBADMSG);
        return;
    }
    unsigned how = no_replace ? RENAME_NOREPLACE : exchange ? RENAME_EXCHANGE : 0;
    acknowledge((int)syscall(SYS_renameat2, base, old_path, base, new_path, how));
}

/* ---- atomic replacement ------------------------------------------------------------------------------- */

static struct temp *find_temp(uint32_t token)
{
    for (size_t i = 0; i < TEMPS_MAX; i++)
        if (temps[i].token == token)
            return &temps[i];
    return NULL;
}

static void drop_temp(struct temp *temp)
{
    if (temp->file < 0)
        (void)unlinkat(temp->directory, temp->hidden, 0);
    close_quietly(temp->file);
    close_quietly(temp->directory);
    temp->token = 0;
}

static bool is_unnamed_unsupported(int error)
{
    return error == EOPNOTSUPP || error == EISDIR || error == ENOENT || error == EINVAL;
}

static int open_temp(struct temp *temp, mode_t mode)
{
    int fd = openat(temp->directory, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, mode);
    hide_name(temp->hidden, sizeof temp->hidden);
    temp->file = fd;
    if (fd < 0 && is_unnamed_unsupported(errno))
        fd = openat(temp->directory, temp->hidden, O_CREAT | O_EXCL | O_NOFOLLOW | O_RDWR | O_CLOEXEC, mode);
    return fd;
}

/* Whether what bears the name may be replaced, by a file of which mode. Otherwise an errno. */
static int judge_replaced(const struct temp *temp, uint32_t flags, mode_t *mode, mode_t *kind)
{
    struct stat facts;
    if (fstatat(temp->directory, temp->name, &facts, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT) != 0)
        return errno == ENOENT ? 0 : errno;
    *kind = facts.st_mode;
    if (S_ISDIR(facts.st_mode))
        return EISDIR;
    if (!S_ISREG(facts.st_mode) && !S_ISLNK(facts.st_mode))
        return ENXIO;
    if ((flags & KEEP_MODE) != 0 && S_ISREG(facts.st_mode))
        *mode = facts.st_mode & 0777;
    return 0;
}

static void handle_temp(uint32_t flags, int base, struct reader *in)
{
    uint32_t mode = take_u32(in);
    char *path = take_string(in);
    char *name;
    mode_t kind = 0;
    if (!complete(in) || mode > 07777) {
        refuse(EBADMSG);
        return;
    }
    struct temp *temp = find_temp(0);
    if (temp == NULL) {
        refuse(EUSERS);
        return;
    }
    bool make = (flags & PARENTS) != 0;
    temp->directory =
        (flags & FOLLOW) != 0 ? open_final_parent(base, path, make, &name) : open_parent(base, path, make, &name);
    if (temp->directory < 0) {
        refuse(errno);
        return;
    }
    memcpy(temp->name, name, strlen(name) + 1);
    int error = judge_replaced(temp, flags, &mode, &kind);
    int fd = error == 0 ? open_temp(temp, mode) : -1;
    if (fd < 0) {
        refuse_kind(error == 0 ? errno : error, error == 0 ? 0 : kind);
        (void)close(temp->directory);
        return;
    }
    temp->token = new_token();
    begin_reply();
    put(temp->token, 4);
    if (!answer_with(fd))
        drop_temp(temp);
    else if (temp->file < 0)
        (void)close(fd);
}

/* Gives the file its name. On failure the hidden name, if there is one, is left to drop_temp. */
static int commit(struct temp *temp, bool no_replace)
{
    if (temp->file >= 0) {
        struct own_path own = own_path(temp->file);
        if (linkat(AT_FDCWD, own.text, temp->directory, temp->name, AT_SYMLINK_FOLLOW) == 0)
            return 0;
        if (errno != EEXIST || no_replace ||
            linkat(AT_FDCWD, own.text, temp->directory, temp->hidden, AT_SYMLINK_FOLLOW) != 0)
            return errno;
        close_quietly(temp->file);
        temp->file = -1;
    }
    unsigned how = no_replace ? RENAME_NOREPLACE : 0;
    if (syscall(SYS_renameat2, temp->directory, temp->hidden, temp->directory, temp->name, how) != 0)
        return errno;
    return 0;
}

static void handle_commit(uint32_t flags, struct reader *in)
{
    uint32_t token = take_u32(in);
    struct stat facts;
    if (!complete(in) || token == 0) {
        refuse(EBADMSG);
        return;
    }
    struct temp *temp = find_temp(token);
    if (temp == NULL) {
        refuse(EBADF);
        return;
    }
    int error = commit(temp, (flags & NO_REPLACE) != 0);
    if (error == 0 && fstatat(temp->directory, temp->name, &facts, AT_SYMLINK_NOFOLLOW) != 0)
        error = errno;
    drop_temp(temp);
    if (error != 0) {
        refuse(error);
        return;
    }
    begin_reply();
    put_facts(&facts);
    answer();
}

/* ---- listing and watching ----------------------------------------------------------------------------- */

static struct cursor *find_cursor(uint32_t token)
{
    for (size_t i = 0; i < CURSORS_MAX; i++)
        if (cursors[i].token == token)
            return &cursors[i];
    return NULL;
}

static struct watch *find_watch(uint32_t token)
{
    for (size_t i = 0; i < WATCHES_MAX; i++)
        if (watches[i].token == token)
            return &watches[i];
    return NULL;
}

static void drop_cursor(struct cursor *cursor)
{
    while (cursor->level >= 0)
        close_quietly(cursor->directories[cursor->level--]);
    cursor->token = 0;
}

static void drop_watch(struct watch *watch)
{
    for (size_t i = 0; i < CURSORS_MAX; i++)
        if (cursors[i].token != 0 && cursors[i].inotify == watch->inotify)
            drop_cursor(&cursors[i]);
    close_quietly(watch->inotify);
    watch->token = 0;
}

/* The number of the watch on an open thing; or 0, and an errno. */
static int add_watch(const struct cursor *cursor, int fd, int *error)
{
    if (cursor->inotify < 0)
        return 0;
    int number = inotify_add_watch(cursor->inotify, own_path(fd).text, WATCHED);
    if (number > 0)
        return number;
    *error = errno;
    return 0;
}

static void put_entry(const char *path, size_t length, const struct stat *facts, int watch, int error)
{
    put_facts(facts);
    put((uint32_t)watch, 4);
    put((uint32_t)error, 4);
    put_string(path, length);
}

static int open_directory(int parent, const char *name)
{
    return openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
}

/* Opens a directory that was found, if it is to be gone into, and watches it. Open, or -1. */
static int open_found(struct cursor *cursor, int parent, const char *name, size_t length, int *watch, int *error)
{
    if (cursor->level + 1 >= cursor->depth_max)
        return -1;
    if (length + 1 + NAME_LENGTH_MAX > PATH_LENGTH_MAX) {
        cursor->cut = true;
        return -1;
    }
    int fd = open_directory(parent, name);
    if (fd < 0) {
        *error = errno;
        return -1;
    }
    *watch = add_watch(cursor, fd, error);
    return fd;
}

/* Puts one entry on the page. The directory to go into, open, or -1. */
static int list_entry(struct cursor *cursor, const struct directory_entry *entry)
{
    int parent = cursor->directories[cursor->level];
    size_t before = cursor->lengths[cursor->level];
    size_t slash = before == 0 ? 0 : 1;
    size_t length = before + slash + strlen(entry->name);
    bool only = (cursor->flags & DIRECTORIES_ONLY) != 0;
    struct stat facts;
    int watch = 0;
    int error = 0;
    int child = -1;
    if (only && entry->type != DT_DIR && entry->type != DT_UNKNOWN)
        return -1;
    if (length > PATH_LENGTH_MAX) {
        cursor->cut = true;
        return -1;
    }
    if (fstatat(parent, entry->name, &facts, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT) != 0) {
        error = errno;
        memset(&facts, 0, sizeof facts);
        facts.st_mode = DTTOIF(entry->type);
    }
    if (error == ENOENT || (only && !S_ISDIR(facts.st_mode)))
        return -1;
    cursor->path[before] = '/';
    memcpy(cursor->path + before + slash, entry->name, strlen(entry->name) + 1);
    if (S_ISDIR(facts.st_mode) && error == 0)
        child = open_found(cursor, parent, entry->name, length, &watch, &error);
    put_entry(cursor->path, length, &facts, watch, error);
    put_target(parent, entry->name, facts.st_mode);
    if (child >= 0)
        cursor->lengths[cursor->level + 1] = length;
    return child;
}

/* Where a walk goes on: in a directory that was just opened, in the one above, or in this one, if at all. */
enum step { STEP_DOWN, STEP_UP, STEP_STAY };

/* Lists on in the innermost directory: from where it stands, until its end, a directory to go into, or enough. */
static enum step list_directory(struct cursor *cursor, uint32_t *sent, uint32_t *looked_at)
{
    _Alignas(struct directory_entry) static char entries[32 * 1024];
    int directory = cursor->directories[cursor->level];
    off_t here = lseek(directory, 0, SEEK_CUR);
    long got;
    while ((got = syscall(SYS_getdents64, directory, entries, sizeof entries)) > 0) {
        for (long at = 0; at < got;) {
            const struct directory_entry *entry = (const void *)(entries + at);
            at += entry->length;
            if (sizeof out.data - out.used < ENTRY_BYTES_MAX || (*looked_at > 0 && turn_over())) {
                if (lseek(directory, here, SEEK_SET) >= 0)
                    return STEP_STAY;
                cursor->cut = true;
                return STEP_UP;
            }
            (*looked_at)++;
            here = (off_t)entry->offset;
            if (is_dot(entry->name))
                continue;
            size_t before = out.used;
            int child = list_entry(cursor, entry);
            *sent += out.used > before;
            if (child < 0)
                continue;
            (void)lseek(directory, here, SEEK_SET);
            cursor->directories[++cursor->level] = child;
            return STEP_DOWN;
        }
    }
    cursor->cut = cursor->cut || got < 0;
    return STEP_UP;
}

static void list_on(struct cursor *cursor, uint32_t *sent)
{
    uint32_t looked_at = 0;
    while (cursor->level >= 0) {
        switch (list_directory(cursor, sent, &looked_at)) {
        case STEP_DOWN:
            break;
        case STEP_UP:
            close_quietly(cursor->directories[cursor->level--]);
            break;
        case STEP_STAY:
            return;
        }
    }
}

static size_t begin_page(void)
{
    begin_reply();
    size_t head = out.used;
    put(0, 4);
    put(0, 4);
    put(0, 4);
    return head;
}

static void end_page(struct cursor *cursor, size_t head, uint32_t sent)
{
    size_t end = out.used;
    out.used = head;
    put(cursor->level >= 0 ? cursor->token : 0, 4);
    put(cursor->cut ? PAGE_CUT : 0, 4);
    put(sent, 4);
    out.used = end;
    if (cursor->level < 0)
        drop_cursor(cursor);
    answer();
}

/* The first page starts with the tree's own root, under an empty path. */
static void list_first(struct cursor *cursor, int root, const struct stat *facts)
{
    uint32_t sent = 1;
    int error = 0;
    int watch = add_watch(cursor, root, &error);
    int directory = -1;
    if (cursor->inotify >= 0 && watch == 0) {
        refuse(error);
        return;
    }
    cursor->level = -1;
    if (S_ISDIR(facts->st_mode) && cursor->depth_max > 0) {
        directory = open_directory(root, ".");
        if (directory < 0) {
            refuse(errno);
            return;
        }
        cursor->level = 0;
        cursor->directories[0] = directory;
        cursor->lengths[0] = 0;
    }
    cursor->token = new_token();
    size_t head = begin_page();
    put_entry("", 0, facts, watch, 0);
    put_string("", 0);
    list_on(cursor, &sent);
    end_page(cursor, head, sent);
}

static void handle_list(uint32_t flags, int base, struct reader *in)
{
    uint32_t depth = take_u32(in);
    uint32_t token = take_u32(in);
    const char *path = take_string(in);
    struct stat facts;
    if (!complete(in) || depth > DEPTH_MAX) {
        refuse(EBADMSG);
        return;
    }
    struct watch *watch = token == 0 ? NULL : find_watch(token);
    struct cursor *cursor = find_cursor(0);
    if ((token != 0 && watch == NULL) || cursor == NULL) {
        refuse(cursor == NULL ? EUSERS : EBADF);
        return;
    }
    int root = openat(base, path, O_PATH | O_CLOEXEC | ((flags & FOLLOW) != 0 ? 0 : O_NOFOLLOW));
    if (root < 0 || fstat(root, &facts) != 0) {
        refuse(errno);
    } else if (!S_ISDIR(facts.st_mode) && watch == NULL) {
        refuse_kind(ENOTDIR, facts.st_mode);
    } else {
        cursor->flags = flags;
        cursor->inotify = watch == NULL ? -1 : watch->inotify;
        cursor->depth_max = (int)depth;
        cursor->cut = false;
        list_first(cursor, root, &facts);
    }
    close_quietly(root);
}

static void handle_list_next(struct reader *in)
{
    uint32_t token = take_u32(in);
    uint32_t sent = 0;
    if (!complete(in) || token == 0) {
        refuse(EBADMSG);
        return;
    }
    struct cursor *cursor = find_cursor(token);
    if (cursor == NULL) {
        refuse(EBADF);
        return;
    }
    size_t head = begin_page();
    list_on(cursor, &sent);
    end_page(cursor, head, sent);
}

static void handle_watch(struct reader *in)
{
    if (!complete(in)) {
        refuse(EBADMSG);
        return;
    }
    struct watch *watch = find_watch(0);
    int inotify = watch == NULL ? -1 : inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    if (inotify < 0) {
        refuse(watch == NULL ? EUSERS : errno);
        return;
    }
    *watch = (struct watch){.token = new_token(), .inotify = inotify};
    begin_reply();
    put(watch->token, 4);
    if (!answer_with(inotify))
        drop_watch(watch);
}

static void handle_unwatch(struct reader *in)
{
    uint32_t token = take_u32(in);
    uint32_t number = take_u32(in);
    if (!complete(in) || token == 0 || number > INT32_MAX) {
        refuse(EBADMSG);
        return;
    }
    const struct watch *watch = find_watch(token);
    if (watch == NULL) {
        refuse(EBADF);
        return;
    }
    acknowledge(inotify_rm_watch(watch->inotify, (int)number));
}

static void handle_close(struct reader *in)
{
    uint32_t token = take_u32(in);
    if (!complete(in) || token == 0) {
        refuse(EBADMSG);
        return;
    }
    struct temp *temp = find_temp(token);
    struct cursor *cursor = find_cursor(token);
    struct watch *watch = find_watch(token);
    if (temp != NULL)
        drop_temp(temp);
    if (cursor != NULL)
        drop_cursor(cursor);
    if (watch != NULL)
        drop_watch(watch);
    begin_reply();
    answer();
}

/* ---- removal ------------------------------------------------------------------------------------------ */

struct removal {
    int directories[REMOVE_LEVELS];
    int level;
    uint32_t done; /* steps towards the end: what was removed or moved up */
    int error;
    bool pause;
};

static bool is_swapped(int error)
{
    return error == ENOENT || error == ENOTDIR || error == ELOOP;
}

static int note(struct removal *removal, int result)
{
    if (result == 0)
        removal->done++;
    else if (!is_swapped(errno))
        removal->error = errno;
    return -1;
}

/* Removes one entry, or moves it up, or returns it open, to be emptied first. */
static int remove_entry(struct removal *removal, const char *name)
{
    int directory = removal->directories[removal->level];
    if (unlinkat(directory, name, 0) == 0)
        return note(removal, 0);
    int error = errno;
    if (error != EISDIR && error != EPERM)
        return note(removal, -1);
    if (unlinkat(directory, name, AT_REMOVEDIR) == 0)
        return note(removal, 0);
    if (errno == ENOTDIR && error == EPERM)
        errno = EPERM;
    if (errno != ENOTEMPTY && errno != EEXIST)
        return note(removal, -1);
    if (removal->level + 1 == REMOVE_LEVELS) {
        char hidden[32];
        hide_name(hidden, sizeof hidden);
        return note(removal, renameat(directory, name, removal->directories[0], hidden));
    }
    int child = open_directory(directory, name);
    return child >= 0 ? child : note(removal, -1);
}

/* Empties the innermost directory as far as that goes without going down. */
static enum step empty_directory(struct removal *removal)
{
    /* Small, because a directory is read again from where it was left to go down. */
    _Alignas(struct directory_entry) static char entries[4 * 1024];
    int directory = removal->directories[removal->level];
    off_t here = lseek(directory, 0, SEEK_CUR);
    bool again = here != 0;
    long got;
    while ((got = syscall(SYS_getdents64, directory, entries, sizeof entries)) > 0) {
        for (long at = 0; at < got;) {
            const struct directory_entry *entry = (const void *)(entries + at);
            at += entry->length;
            if (!is_dot(entry->name)) {
                again = true;
                int child = remove_entry(removal, entry->name);
                removal->pause = turn_over();
                if (child >= 0) {
                    (void)lseek(directory, here, SEEK_SET);
                    removal->directories[++removal->level] = child;
                    return STEP_DOWN;
                }
                if (removal->error != 0 || removal->pause)
                    return STEP_STAY;
            }
            here = (off_t)entry->offset;
        }
    }
    if (got < 0)
        removal->error = errno;
    if (!again || removal->error != 0 || lseek(directory, 0, SEEK_SET) != 0)
        return STEP_UP;
    return STEP_STAY;
}

static void empty_tree(struct removal *removal)
{
    while (removal->level >= 0 && removal->error == 0 && !removal->pause)
        if (empty_directory(removal) == STEP_UP)
            close_quietly(removal->directories[removal->level--]);
    while (removal->level >= 0)
        close_quietly(removal->directories[removal->level--]);
}

static int remove_one(int directory, const char *name)
{
    if (unlinkat(directory, name, 0) == 0)
        return 0;
    int error = errno;
    if (error != EISDIR && error != EPERM)
        return -1;
    int result = unlinkat(directory, name, AT_REMOVEDIR);
    if (result != 0 && errno == ENOTDIR)
        errno = error;
    return result;
}

/* Removes a name and what is below it. Whether there is more to do. */
static bool remove_tree(struct removal *removal, int directory, const char *name)
{
    if (remove_one(directory, name) == 0) {
        removal->done++;
        return false;
    }
    if (errno != ENOTEMPTY && errno != EEXIST) {
        removal->error = errno;
        return false;
    }
    removal->directories[0] = open_directory(directory, name);
    if (removal->directories[0] < 0) {
        removal->error = errno;
        return false;
    }
    removal->level = 0;
    empty_tree(removal);
    if (removal->error != 0)
        return false;
    if (!removal->pause && remove_one(directory, name) == 0) {
        removal->done++;
        return false;
    }
    if (!removal->pause && errno != ENOTEMPTY && errno != EEXIST)
        removal->error = errno;
    else if (removal->done == 0)
        removal->error = ENOTEMPTY;
    return removal->error == 0;
}

static void handle_remove(uint32_t flags, int base, struct reader *in)
{
    struct removal removal = {.level = -1};
    char *path = take_string(in);
    char *name;
    bool more = false;
    if (!complete(in)) {
        refuse(EBADMSG);
        return;
    }
    int directory = open_parent(base, path, false, &name);
    if (directory < 0)
        removal.error = errno;
    else if ((flags & RECURSIVE) != 0)
        more = remove_tree(&removal, directory, name);
    else if (remove_one(directory, name) != 0)
        removal.error = errno;
    close_quietly(directory);
    if (removal.error != 0) {
        refuse(removal.error);
        return;
    }
    begin_reply();
    put(more, 4);
    answer();
}

/* ---- requests ----------------------------------------------------------------------------------------- */

/* Of requests with paths: the flags that each knows, and who serves it. */
static const struct {
    uint32_t flags;
    void (*handle)(uint32_t flags, int base, struct reader *in);
} by_path[] = {
    [OPEN] = {FOLLOW | PARENTS | READ | WRITE | CREATE | EXCLUSIVE | TRUNCATE | APPEND, handle_open},
    [STAT] = {FOLLOW, handle_stat},
    [LIST] = {FOLLOW | DIRECTORIES_ONLY, handle_list},
    [MAKE_DIR] = {PARENTS, handle_make_dir},
    [RENAME] = {NO_REPLACE | EXCHANGE, handle_rename},
    [REMOVE] = {RECURSIVE, handle_remove},
    [SYMLINK] = {PARENTS, handle_symlink},
    [CHMOD] = {FOLLOW, handle_chmod},
    [SET_TIMES] = {FOLLOW, handle_set_times},
    [TEMP] = {FOLLOW | PARENTS | KEEP_MODE, handle_temp},
};

static void dispatch_path(struct reader *in)
{
    uint32_t flags = take_u32(in);
    const char *base_path = take_string(in);
    if (in->bad || (flags & ~by_path[asked_type].flags) != 0) {
        refuse(EBADMSG);
        return;
    }
    int base = open_base(base_path);
    if (base < 0) {
        refuse(errno);
        return;
    }
    by_path[asked_type].handle(flags, base, in);
    (void)close(base);
}

static void dispatch_commit(struct reader *in)
{
    uint32_t flags = take_u32(in);
    if (in->bad || (flags & ~(uint32_t)NO_REPLACE) != 0)
        refuse(EBADMSG);
    else
        handle_commit(flags, in);
}

static void dispatch(struct reader *in)
{
    uint16_t magic = take_u16(in);
    asked_type = take_u16(in);
    asked_id = take_u32(in);
    if (in->bad || magic != MAGIC)
        leave();
    begin_turn();
    switch (asked_type) {
    case LIST_NEXT:
        handle_list_next(in);
        break;
    case CLOSE:
        handle_close(in);
        break;
    case COMMIT:
        dispatch_commit(in);
        break;
    case WATCH:
        handle_watch(in);
        break;
    case UNWATCH:
        handle_unwatch(in);
        break;
    default:
        if (asked_type < sizeof by_path / sizeof by_path[0] && by_path[asked_type].handle != NULL)
            dispatch_path(in);
        else
            refuse(EOPNOTSUPP);
        break;
    }
}

_Noreturn void serve_files(int socket_fd, int proc_fd)
{
    peer_fd = socket_fd;
    (void)umask(0);
    if (fchdir(proc_fd) != 0)
        leave();
    (void)close(proc_fd);
    for (;;) {
        /* Without room for control messages, descriptors that come along are closed by the kernel. */
        struct iovec part = {.iov_base = inbox, .iov_len = sizeof inbox};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
        ssize_t got = recvmsg(peer_fd, &message, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0 || (message.msg_flags & MSG_TRUNC) != 0)
            leave();
        struct reader in = {.at = inbox, .left = (size_t)got};
        dispatch(&in);
    }
}
