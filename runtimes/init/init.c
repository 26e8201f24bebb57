/*
 * sandbox-init: PID 1 of every sandbox.
 *
 * Theory of operation
 * ===================
 *
 * Init owns the processes of a sandbox so that a daemon which comes and goes need not. It listens on a
 * SOCK_SEQPACKET Unix socket; one datagram is one message (the table is in wire.py). One thread, one epoll, no
 * heap once started: every table is static and bounded, so nothing that a peer or a command does can make it grow.
 * Pages of
 * the static buffers cost memory only once they are touched.
 *
 * Trust. Three kinds of process meet here. Peers live outside of this pid namespace (SO_PEERCRED shows pid 0) and
 * may ask for anything; still, whatever they send is checked, because a mistake there must not end all commands.
 * Commands are hostile and run under init's own uid: they may signal everything but PID 1, which the kernel
 * protects. They cannot trace init or its keepers, nor reach their descriptors, as these are not dumpable. SIGTERM
 * counts only if it comes from outside of the namespace. What the kernel would still let the same uid do to init,
 * to lower its resource limits (RLIMIT_CPU kills it, RLIMIT_NOFILE blinds it) and its share of the processor, is
 * refused by a seccomp filter that init puts on itself and that its children inherit.
 *
 * Keepers. A command gets a process of its own, the keeper, forked from init and a child subreaper: everything
 * that descends from the command, by double fork and setsid too, stays below the keeper, so "the tree of this
 * command" is a fact that the kernel maintains. The keeper starts the command, reaps, writes fixed-size records
 * into one pipe that all keepers share (a write below PIPE_BUF is atomic), and exits when nothing is left. It
 * takes no orders. Sharing one pipe means that init holds no descriptor per command: a thousand commands cannot
 * exhaust its descriptors.
 *
 *     STARTING --spawned--> RUNNING --main ended--> EXITED --nothing left--> GONE --forget--> (free)
 *         `--failed--> FAILED --answered--> (free)
 *
 * Killing. Only init kills, since only init cannot be killed, and it needs neither fork nor memory for it. A wave
 * goes over /proc and signals everything whose chain of parents leads to the keeper; waves follow each other,
 * ever less often, until the keeper reports that nothing is left. A SIGKILL also goes to the process group of
 * each process found, which the kernel does atomically against fork. From the second wave on, the tree is first
 * stopped until a scan finds nobody running, so that slots freed by the dead (pids.max) are not refilled by the
 * living. A pid found cannot be reused before we signal it unless all other pids were handed out in those
 * microseconds; direct children of a keeper cannot be reused at all until it reaps them.
 *
 * Lost keepers. A command can SIGKILL its keeper. The orphans then become children of init: strays, known by
 * having no living keeper above them. All strays are killed, waves again; once none is left, the commands of lost
 * keepers are reported as gone, flagged. A stopped keeper is continued; one that is stopped over and over is
 * killed, and its command with it. (Orphans of a process that the engine itself put into the container look like
 * strays, and are killed with them.)
 *
 * File workers. FILES forks a process that does file operations for whoever asked (files.c) and hands out the other
 * end of its socket. Init keeps a copy of the worker's end, only to see when the other one is closed: the worker
 * should then end by itself, and is killed if a system call holds it up. It is no command and no stray: no wave
 * reaches it. A command can kill it, or stop it, and then it is continued or killed like a keeper.
 *
 * Sockets. LISTEN and DIAL make a TCP socket on the loopback of the network namespace that init shares with its
 * commands, and hand it out. Init keeps no copy and no record: how many there are is up to whoever asks, and nothing
 * that a command does to a connection can be felt here. A connect that would block goes on after it was handed out.
 *
 * Terminals. With KEEP_PTY init keeps a copy of a terminal's master, which TERMINAL hands out again: the daemon that
 * held the other copy may be killed, and the terminal must not hang up. Nobody reads meanwhile; what a command writes
 * fills the kernel's buffer, and then it waits. The copy goes when the command is forgotten, so that its last words
 * can be read as well. It is never passed to anything inside: the keeper and every worker close it first.
 *
 * Versions. HELLO settles on the highest version that both ends speak, and a connection is served in that one: an
 * older daemon is told nothing that it would take for a breach of the protocol. Version 2 added KEEP_PTY and TERMINAL.
 *
 * Output. Events are not queued: which connection has yet to hear of what is a bit in the command's table entry,
 * so a peer that never reads costs nothing and events cannot overflow. A peer whose socket is full is not read
 * from until it drains; when all places are taken, such a peer is the one that has to leave.
 *
 * Bad input. A message without a readable header, or one too long, ends the connection. A readable header with a
 * body that is not what its type says, with descriptors that do not belong, or with an unknown type, is answered
 * with ERROR, and the connection goes on. Descriptors that come with a refused message are closed at once.
 */

#define _GNU_SOURCE

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "files.h"
#include "message.h"

#define PROGRAM_VERSION "0.4.0"
#define PROTOCOL_VERSION 2U /* the highest; 1 is spoken as well */

/* ---- bounds ------------------------------------------------------------------------------------------- */

enum {
    COMMANDS_MAX = 1024,
    CONNECTIONS_MAX = 8,             /* one bit each in a uint8_t */
    WORKERS_MAX = 8,
    MESSAGE_BYTES_MAX = 192 * 1024,  /* below the kernel's default wmem_max of 208 KiB */
    LIST_PAGE_MAX = 256,             /* 256 * 56 bytes fit into the 16 KiB that the daemon reads at once */
    STRINGS_MAX = 4096,              /* entries of argv, and of env */
    RLIMITS_MAX = 16,                /* as many as Linux has */
    DESCRIPTORS_MAX = 16,            /* received at most; more than 3 are refused */
    PTYS_PENDING_MAX = 16,           /* masters not yet handed out */
    PTYS_KEPT_MAX = 64,              /* and never more than a quarter of the descriptors that init may have */
    LISTEN_BACKLOG = 64,
    PATH_BYTES_MAX = 4096,
    PIDS_MAX = 4 * 1024 * 1024,      /* the kernel's PID_MAX_LIMIT */
    WALK_PASSES_MAX = 16,
    STOP_PASSES_MAX = 8,
    WAVE_MS_MIN = 1,
    WAVE_MS_MAX = 64,
    KEEPER_IDLE_WAVES_MAX = 32,      /* about 1.7 s in which a keeper did not notice an empty tree */
    KEEPER_STOPS_MAX = 32,
    WORKER_GRACE_MS = 500,           /* between the end of its socket and KILL */
    ACCEPT_PAUSE_MS = 100,
    STOP_GRACE_MS = 500,             /* between TERM and KILL ... */
    STOP_TOTAL_MS = 800              /* ... and to the end: `docker stop` sees less than a second */
};

/* ---- protocol ----------------------------------------------------------------------------------------- */

#define MAGIC 0x4253U /* "SB" */

enum type {
    HELLO = 0x0001,
    SPAWN = 0x0002,
    SIGNAL = 0x0003,
    KILL = 0x0004,
    LIST = 0x0005,
    FORGET = 0x0006,
    TERMINAL = 0x0007,
    FILES = 0x0010,
    LISTEN = 0x0011,
    DIAL = 0x0012,
    EVENT_EXITED = 0x4001,
    EVENT_GONE = 0x4002,
    REPLY = 0x8000, /* REPLY | the request's type */
    ERROR = 0xffff
};

enum stage {
    STAGE_REQUEST = 0,
    STAGE_ADMIT = 1,
    STAGE_DESCRIPTORS = 2,
    STAGE_PTY = 3,
    STAGE_FORK = 4,
    STAGE_SESSION = 5,
    STAGE_RLIMIT = 6,
    STAGE_CHDIR = 7,
    STAGE_EXEC = 8,
    STAGE_KEEPER = 9,
    STAGE_SOCKET = 10
};

enum scope { SCOPE_MAIN = 0, SCOPE_GROUP = 1, SCOPE_TREE = 2 };

#define SPAWN_PTY 1U
#define SPAWN_INHERIT_ENV 2U
#define SPAWN_KEEP_PTY 4U
#define FILES_VERSION 1U
#define LOOPBACK_IPV6 1U
#define GONE_KEEPER_LOST 1U
#define EXITED_STATUS_UNKNOWN 2U
#define PTY_KEPT 4U

/* ---- state -------------------------------------------------------------------------------------------- */

enum state { FREE = 0, STARTING = 1, RUNNING = 2, EXITED = 3, GONE = 4, FAILED = 5 };

struct usage {
    uint64_t utime_us;
    uint64_t stime_us;
    uint64_t maxrss_kib;
    uint64_t wall_us;
};

struct command {
    uint64_t id;
    uint64_t started_ns;
    struct usage usage;
    enum state state;
    pid_t keeper;       /* 0: none any more */
    pid_t pid;          /* the main process */
    int status;         /* of wait4; or the errno of a FAILED */
    enum stage stage;   /* of a FAILED */
    uint32_t flags;
    uint32_t reply_id;
    int reply_to;       /* connection that waits for the answer to SPAWN, or -1 */
    int pty_master;     /* until it is handed out, or -1 */
    int kept_master;    /* from then on, where it is kept, or -1 */
    int waves;
    int idle_waves;
    int keeper_stops;
    bool killing;
    bool emptied;       /* by a kill: nothing is left but the keeper, which exits */
    bool orphaned;      /* the keeper is lost, strays may live */
    bool keep_pty;
    uint8_t exited_due; /* connections that have yet to hear of it */
    uint8_t gone_due;
};

struct connection {
    int fd;           /* -1: free */
    unsigned version; /* 0: no HELLO yet */
    bool blocked;     /* its socket is full: wait for POLLOUT, read nothing */
};

struct worker {
    pid_t pid;          /* 0: free */
    int fd;             /* a copy of its end, or -1 */
    int stops;
    uint64_t kill_at_ns; /* 0: not to be killed */
};

enum report_kind { REPORT_SPAWNED, REPORT_FAILED, REPORT_EXITED, REPORT_GONE };

struct report {
    uint64_t id;
    struct usage usage;
    uint32_t slot;
    uint32_t kind;
    int32_t value; /* pid, errno or wait status */
    int32_t stage;
};

struct launch {
    uint64_t id;
    char *argv[STRINGS_MAX + 1];
    char *env[STRINGS_MAX + 1];
    char *cwd;
    struct {
        uint32_t resource;
        struct {
            uint64_t soft;
            uint64_t hard;
        } limit; /* as the kernel's rlimit64 */
    } rlimits[RLIMITS_MAX];
    size_t rlimit_count;
    uint32_t flags;
    uint16_t rows;
    uint16_t cols;
    int descriptors[3];
};

struct descriptors {
    int fd[DESCRIPTORS_MAX];
    size_t count;
    bool cut; /* the kernel could not install all of them */
};

static struct command commands[COMMANDS_MAX];
static size_t commands_end; /* no used slot at or beyond */
static struct connection connections[CONNECTIONS_MAX];
static struct worker workers[WORKERS_MAX];
static struct launch launch;
static unsigned char inbox[MESSAGE_BYTES_MAX];
static unsigned char nonce[16];

static int listen_fd = -1;
static int signal_fd = -1;
static int epoll_fd = -1;
static int proc_fd = -1;
static int report_read_fd = -1;
static int report_write_fd = -1;
static int reserve_fd = -1; /* gives its number to a walk, so that a full table cannot stop a kill */
static pid_t own_pid;
static pid_t own_group;
static bool is_pid1;

static bool strays_wanted;
static bool stopping;
static uint64_t stop_began_ns;
static uint64_t wave_next_ns;
static uint64_t accept_next_ns;
static int wave_ms;

#define NS_PER_MS UINT64_C(1000000)

static uint64_t now_ns(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

static void close_fd(int *fd)
{
    if (*fd >= 0) {
        (void)close(*fd);
        *fd = -1;
    }
}

/* ---- what wakes the loop ------------------------------------------------------------------------------ */

/* epoll and not poll, because poll fails when RLIMIT_NOFILE is below the number of entries. */

enum wake {
    WAKE_REPORTS,
    WAKE_SIGNALS,
    WAKE_LISTEN,
    WAKE_CONNECTIONS,
    WAKE_WORKERS = WAKE_CONNECTIONS + CONNECTIONS_MAX,
    WAKE_END = WAKE_WORKERS + WORKERS_MAX
};

static int watch(int operation, int fd, uint32_t events, uint32_t wake)
{
    struct epoll_event event = {.events = events, .data.u32 = wake};
    return epoll_ctl(epoll_fd, operation, fd, &event);
}

static void set_blocked(int index, bool blocked)
{
    struct connection *connection = &connections[index];
    if (connection->blocked != blocked)
        (void)watch(EPOLL_CTL_MOD, connection->fd, blocked ? EPOLLOUT : EPOLLIN, WAKE_CONNECTIONS + (uint32_t)index);
    connection->blocked = blocked;
}

/* ---- messages of this protocol ------------------------------------------------------------------------- */

static uint64_t take_command_id(struct reader *in)
{
    uint64_t id = take_u64(in);
    if (id > INT64_MAX)
        in->bad = true;
    return id;
}

static void put_usage(const struct usage *usage)
{
    put(usage->utime_us, 8);
    put(usage->stime_us, 8);
    put(usage->maxrss_kib, 8);
    put(usage->wall_us, 8);
}

static void begin(uint32_t type, uint32_t request_id)
{
    begin_message(MAGIC, type, request_id);
}

/* ---- signals to processes ----------------------------------------------------------------------------- */

/* The only two callers of kill: pid 0, 1 and -1 would mean everybody, and on the host that is no sandbox. */
static int signal_process(pid_t pid, int signo)
{
    if (pid <= 1) {
        errno = ESRCH;
        return -1;
    }
    return kill(pid, signo);
}

static int signal_group(pid_t group, int signo)
{
    if (group <= 1 || group == own_group) {
        errno = ESRCH;
        return -1;
    }
    return kill(-group, signo);
}

/* ---- the table ---------------------------------------------------------------------------------------- */

static struct command *find_command(uint64_t id)
{
    for (size_t i = 0; i < commands_end; i++)
        if (commands[i].state != FREE && commands[i].id == id)
            return &commands[i];
    return NULL;
}

static struct command *find_keeper(pid_t keeper)
{
    for (size_t i = 0; i < commands_end; i++)
        if (commands[i].state != FREE && commands[i].keeper == keeper)
            return &commands[i];
    return NULL;
}

/* That of a pid, or with 0 a free one. */
static struct worker *find_worker(pid_t pid)
{
    for (size_t i = 0; i < WORKERS_MAX; i++)
        if (workers[i].pid == pid)
            return &workers[i];
    return NULL;
}

static struct command *free_slot(void)
{
    for (size_t i = 0; i < COMMANDS_MAX; i++)
        if (commands[i].state == FREE)
            return &commands[i];
    return NULL;
}

static void release(struct command *command)
{
    close_fd(&command->pty_master);
    close_fd(&command->kept_master);
    memset(command, 0, sizeof *command);
    command->pty_master = -1;
    command->kept_master = -1;
    command->reply_to = -1;
    while (commands_end > 0 && commands[commands_end - 1].state == FREE)
        commands_end--;
}

static uint32_t count_commands(void)
{
    uint32_t count = 0;
    for (size_t i = 0; i < commands_end; i++)
        if (commands[i].state != FREE && commands[i].state != FAILED)
            count++;
    return count;
}

static size_t ptys_kept_max(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur / 4 > PTYS_KEPT_MAX)
        return PTYS_KEPT_MAX;
    return (size_t)(limit.rlim_cur / 4);
}

/* The master was handed out, or there is nobody left to take it: it is kept where that was asked for, if there is
 * room. Where it is not, the terminal ends with whoever holds it. */
static void master_delivered(struct command *command)
{
    size_t kept = 0;
    for (size_t i = 0; i < commands_end; i++)
        if (commands[i].state != FREE && commands[i].kept_master >= 0)
            kept++;
    if (command->keep_pty && command->state != FAILED && kept < ptys_kept_max()) {
        command->kept_master = command->pty_master;
        command->pty_master = -1;
    }
    close_fd(&command->pty_master);
}

static uint8_t audience(void)
{
    unsigned bits = 0;
    for (unsigned i = 0; i < CONNECTIONS_MAX; i++)
        if (connections[i].fd >= 0 && connections[i].version != 0)
            bits |= 1U << i;
    return (uint8_t)bits;
}

static void want_wave(void)
{
    wave_ms = WAVE_MS_MIN;
    wave_next_ns = now_ns() + (uint64_t)wave_ms * NS_PER_MS;
}

/* ---- what happens to a file worker -------------------------------------------------------------------- */

/* Its socket has ended: it has a while to notice. */
static void worker_dismissed(struct worker *worker)
{
    /* The worker holds a copy, so closing alone does not end the watch. */
    if (worker->fd >= 0)
        (void)watch(EPOLL_CTL_DEL, worker->fd, 0, 0);
    close_fd(&worker->fd);
    worker->kill_at_ns = now_ns() + WORKER_GRACE_MS * NS_PER_MS;
}

/* Asks the kernel: what woke us may have been the end of another one that had this place. */
static void worker_hung_up(struct worker *worker)
{
    struct pollfd end = {.fd = worker->fd};
    if (worker->fd >= 0 && poll(&end, 1, 0) == 1 && (end.revents & POLLHUP) != 0)
        worker_dismissed(worker);
}

static void worker_ended(struct worker *worker)
{
    worker_dismissed(worker);
    *worker = (struct worker){.fd = -1};
}

static void worker_stopped(struct worker *worker)
{
    worker->stops++;
    (void)signal_process(worker->pid, worker->stops > KEEPER_STOPS_MAX ? SIGKILL : SIGCONT);
}

static void kill_overdue_workers(void)
{
    for (size_t i = 0; i < WORKERS_MAX; i++) {
        if (workers[i].kill_at_ns == 0 || now_ns() < workers[i].kill_at_ns)
            continue;
        (void)signal_process(workers[i].pid, SIGKILL);
        workers[i].kill_at_ns = 0;
    }
}

static void dismiss_workers(void)
{
    for (size_t i = 0; i < WORKERS_MAX; i++) {
        if (workers[i].fd < 0)
            continue;
        (void)shutdown(workers[i].fd, SHUT_RDWR);
        worker_dismissed(&workers[i]);
    }
}

/* ---- what happens to a command ------------------------------------------------------------------------ */

static void command_failed(struct command *command, int error, enum stage stage)
{
    close_fd(&command->pty_master);
    command->status = error;
    command->stage = stage;
    command->state = FAILED;
    command->keeper = 0;
    if (command->reply_to < 0)
        release(command);
}

static void command_exited(struct command *command, int status, const struct usage *usage)
{
    command->status = status;
    command->usage = *usage;
    command->state = EXITED;
    command->exited_due = audience();
}

static void command_gone(struct command *command)
{
    if (command->state == RUNNING) {
        struct usage unknown = {.wall_us = (now_ns() - command->started_ns) / 1000};
        command->flags |= EXITED_STATUS_UNKNOWN;
        command_exited(command, 0, &unknown);
    }
    command->state = GONE;
    command->keeper = 0;
    command->killing = false;
    command->orphaned = false;
    command->gone_due = audience();
}

static void keeper_lost(struct command *command)
{
    if (command->state == STARTING) {
        command_failed(command, ECANCELED, STAGE_KEEPER);
    } else {
        command->keeper = 0;
        command->flags |= GONE_KEEPER_LOST;
        command->killing = false;
        command->orphaned = true;
    }
    strays_wanted = true;
    want_wave();
}

static void keeper_stopped(struct command *command)
{
    command->keeper_stops++;
    (void)signal_process(command->keeper, command->keeper_stops > KEEPER_STOPS_MAX ? SIGKILL : SIGCONT);
}

static void handle_report(const struct report *report)
{
    struct command *command = report->slot < COMMANDS_MAX ? &commands[report->slot] : NULL;
    if (command == NULL || command->state == FREE || command->id != report->id)
        return;
    switch ((enum report_kind)report->kind) {
    case REPORT_SPAWNED:
        command->pid = report->value;
        command->state = RUNNING;
        break;
    case REPORT_FAILED:
        command_failed(command, report->value, (enum stage)report->stage);
        break;
    case REPORT_EXITED:
        command_exited(command, report->value, &report->usage);
        break;
    case REPORT_GONE:
        /* Whoever asked for a kill is told when the keeper is gone as well; for others that is not worth a wakeup. */
        if (command->killing)
            command->emptied = true;
        else
            command_gone(command);
        break;
    }
}

static void drain_reports(void)
{
    struct report reports[32];
    ssize_t got;
    while ((got = read(report_read_fd, reports, sizeof reports)) > 0) {
        for (size_t i = 0; i < (size_t)got / sizeof reports[0]; i++)
            handle_report(&reports[i]);
        if ((size_t)got < sizeof reports)
            break;
    }
}

static uint64_t microseconds(const struct timeval *time)
{
    return (uint64_t)time->tv_sec * UINT64_C(1000000) + (uint64_t)time->tv_usec;
}

static struct usage usage_of(const struct rusage *rusage, uint64_t started_ns)
{
    return (struct usage){
        .utime_us = microseconds(&rusage->ru_utime),
        .stime_us = microseconds(&rusage->ru_stime),
        .maxrss_kib = (uint64_t)rusage->ru_maxrss,
        .wall_us = (now_ns() - started_ns) / 1000,
    };
}

/* The main process of a lost keeper, now our own child: its end is known after all. */
static void reaped_orphan(pid_t pid, int status, const struct rusage *rusage)
{
    for (size_t i = 0; i < commands_end; i++) {
        struct command *command = &commands[i];
        if (command->state == RUNNING && command->pid == pid) {
            struct usage usage = usage_of(rusage, command->started_ns);
            command_exited(command, status, &usage);
            return;
        }
    }
}

static void reap(void)
{
    struct rusage rusage;
    int status;
    pid_t pid;
    while ((pid = wait4(-1, &status, WNOHANG | WUNTRACED, &rusage)) > 0) {
        /* Whatever a dead keeper had to say is in the pipe by now. */
        drain_reports();
        struct command *command = find_keeper(pid);
        struct worker *worker = find_worker(pid);
        if (WIFSTOPPED(status)) {
            if (command != NULL)
                keeper_stopped(command);
            if (worker != NULL)
                worker_stopped(worker);
        } else if (worker != NULL) {
            worker_ended(worker);
        } else if (command != NULL && command->emptied) {
            command_gone(command);
        } else if (command != NULL) {
            keeper_lost(command);
        } else {
            reaped_orphan(pid, status, &rusage);
        }
    }
}

/* ---- walking a tree ----------------------------------------------------------------------------------- */

struct process {
    pid_t pid;
    pid_t parent;
    pid_t group;
    char state;
};

/* Whom a walk is after: everything below root. Below init itself, keepers and file workers are never signalled; a
 * hunt for strays does not look behind keepers either. */
struct hunt {
    pid_t root;
    pid_t only_group; /* 0: any */
    int signo;
    bool whole_groups;
    bool behind_keepers;
};

struct tally {
    size_t found;  /* whoever is there, zombies too */
    size_t living; /* not a zombie */
    size_t active; /* neither zombie nor stopped */
    size_t added;
    bool disorder; /* somebody is listed before his parent: another pass may find more */
};

static uint64_t found_bits[PIDS_MAX / 64];
static size_t found_low = PIDS_MAX / 64;
static size_t found_high;

static bool is_found(pid_t pid)
{
    return pid > 0 && pid < PIDS_MAX && (found_bits[pid / 64] >> (pid % 64) & 1U) != 0;
}

static void set_found(pid_t pid)
{
    size_t word = (size_t)pid / 64;
    found_bits[word] |= UINT64_C(1) << (pid % 64);
    if (word < found_low)
        found_low = word;
    if (word + 1 > found_high)
        found_high = word + 1;
}

static void clear_found(void)
{
    if (found_low < found_high)
        memset(found_bits + found_low, 0, (found_high - found_low) * sizeof found_bits[0]);
    found_low = PIDS_MAX / 64;
    found_high = 0;
}

static pid_t take_decimal(const char **text)
{
    long value = 0;
    while (**text == ' ')
        (*text)++;
    while (**text >= '0' && **text <= '9' && value < PIDS_MAX)
        value = value * 10 + (*(*text)++ - '0');
    return (pid_t)value;
}

/* "pid (name) state parent group ...", where the name may hold anything, brackets too. */
static bool read_process(pid_t pid, struct process *process)
{
    char path[32];
    char text[512];
    (void)snprintf(path, sizeof path, "%d/stat", (int)pid);
    int fd = openat(proc_fd, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t got = read(fd, text, sizeof text - 1);
    (void)close(fd);
    if (got <= 0)
        return false;
    text[got] = 0;
    const char *at = strrchr(text, ')');
    if (at == NULL || at[1] != ' ' || at[2] == 0)
        return false;
    process->pid = pid;
    process->state = at[2];
    at += 3;
    process->parent = take_decimal(&at);
    process->group = take_decimal(&at);
    return true;
}

static void hit(const struct hunt *hunt, const struct process *process, struct tally *tally)
{
    bool living = process->state != 'Z' && process->state != 'X';
    bool still = process->state == 'T' || process->state == 't';
    if (hunt->only_group != 0 && process->group != hunt->only_group)
        return;
    tally->found++;
    if (living)
        tally->living++;
    if (living && !still)
        tally->active++;
    if (hunt->signo == SIGSTOP && !(living && !still))
        return;
    (void)signal_process(process->pid, hunt->signo);
    if (hunt->whole_groups)
        (void)signal_group(process->group, hunt->signo);
}

static void visit(const struct hunt *hunt, pid_t pid, struct tally *tally)
{
    struct process process;
    if (pid <= 1 || pid >= PIDS_MAX || pid == own_pid || pid == hunt->root || is_found(pid))
        return;
    if (!read_process(pid, &process))
        return;
    if (process.parent != hunt->root && !is_found(process.parent)) {
        tally->disorder = tally->disorder || process.parent > pid;
        return;
    }
    if (process.parent == own_pid && find_worker(pid) != NULL)
        return;
    if (process.parent == own_pid && find_keeper(pid) != NULL) {
        if (hunt->behind_keepers) {
            set_found(pid);
            tally->added++;
        }
        return;
    }
    set_found(pid);
    tally->added++;
    hit(hunt, &process, tally);
}

struct directory_entry {
    uint64_t inode;
    int64_t offset;
    unsigned short length;
    unsigned char type;
    char name[];
};

static void walk_pass(const struct hunt *hunt, struct tally *tally)
{
    /* Small on purpose: what is listed is signalled before much can change. */
    _Alignas(struct directory_entry) char entries[512];
    long got;
    if (lseek(proc_fd, 0, SEEK_SET) < 0)
        return;
    while ((got = syscall(SYS_getdents64, proc_fd, entries, sizeof entries)) > 0) {
        for (long at = 0; at < got;) {
            const struct directory_entry *entry = (const void *)(entries + at);
            const char *name = entry->name;
            if (*name >= '1' && *name <= '9')
                visit(hunt, take_decimal(&name), tally);
            at += entry->length;
        }
    }
}

static struct tally walk(const struct hunt *hunt)
{
    struct tally tally = {0};
    clear_found();
    close_fd(&reserve_fd);
    for (int pass = 0; pass < WALK_PASSES_MAX; pass++) {
        tally.added = 0;
        tally.disorder = false;
        walk_pass(hunt, &tally);
        if (tally.added == 0 || !tally.disorder)
            break;
    }
    reserve_fd = fcntl(proc_fd, F_DUPFD_CLOEXEC, 3);
    return tally;
}

/* ---- killing ------------------------------------------------------------------------------------------ */

static struct tally strike(pid_t root, bool stop_first, bool whole_groups, bool behind_keepers)
{
    struct hunt hunt = {.root = root, .signo = SIGSTOP, .behind_keepers = behind_keepers};
    if (stop_first) {
        for (int pass = 0; pass < STOP_PASSES_MAX; pass++)
            if (walk(&hunt).active == 0)
                break;
    }
    hunt.signo = SIGKILL;
    hunt.whole_groups = whole_groups;
    return walk(&hunt);
}

static void wave(struct command *command)
{
    /* What is known without /proc goes first: it works even if nothing can be opened. */
    if (command->state == RUNNING) {
        (void)signal_group(command->pid, SIGKILL);
        (void)signal_process(command->pid, SIGKILL);
    }
    struct tally tally = strike(command->keeper, command->waves > 0, true, false);
    (void)signal_process(command->keeper, SIGCONT);
    command->waves++;
    command->idle_waves = tally.living == 0 ? command->idle_waves + 1 : 0;
    if (command->idle_waves > KEEPER_IDLE_WAVES_MAX)
        (void)signal_process(command->keeper, SIGKILL);
}

static void stray_wave(void)
{
    if (strike(own_pid, true, false, false).found > 0)
        return;
    strays_wanted = false;
    for (size_t i = 0; i < commands_end; i++)
        if (commands[i].orphaned)
            command_gone(&commands[i]);
}

static bool anything_to_kill(void)
{
    if (strays_wanted || stopping)
        return true;
    for (size_t i = 0; i < commands_end; i++)
        if (commands[i].killing)
            return true;
    return false;
}

static void run_waves(void)
{
    for (size_t i = 0; i < commands_end; i++)
        if (commands[i].killing && commands[i].keeper != 0)
            wave(&commands[i]);
    if (strays_wanted)
        stray_wave();
    if (stopping && now_ns() - stop_began_ns >= STOP_GRACE_MS * NS_PER_MS)
        (void)strike(own_pid, true, false, true);
    wave_ms = wave_ms * 2 > WAVE_MS_MAX ? WAVE_MS_MAX : wave_ms * 2;
    wave_next_ns = now_ns() + (uint64_t)wave_ms * NS_PER_MS;
}

static void begin_stop(void)
{
    struct hunt everybody = {.root = own_pid, .signo = SIGTERM, .behind_keepers = true};
    if (stopping)
        return;
    stopping = true;
    stop_began_ns = now_ns();
    dismiss_workers();
    (void)walk(&everybody);
    want_wave();
}

static bool all_stopped(void)
{
    if (now_ns() - stop_began_ns >= STOP_TOTAL_MS * NS_PER_MS)
        return true;
    for (size_t i = 0; i < commands_end; i++)
        if (commands[i].keeper != 0 || commands[i].orphaned)
            return false;
    for (size_t i = 0; i < WORKERS_MAX; i++)
        if (workers[i].pid != 0)
            return false;
    return !strays_wanted;
}

/* ---- the keeper --------------------------------------------------------------------------------------- */

static _Noreturn void keeper_report(const struct report *reports, size_t count)
{
    (void)!write(report_write_fd, reports, count * sizeof reports[0]);
    _exit(0);
}

/* Written by the command's process before exec, read by its keeper: vfork shares the memory. */
static volatile int start_error;
static volatile int start_stage;

static _Noreturn void give_up(enum stage stage)
{
    start_error = errno;
    start_stage = (int)stage;
    _exit(127);
}

static const char *search_path(void)
{
    for (char **entry = launch.env; *entry != NULL; entry++)
        if (strncmp(*entry, "PATH=", 5) == 0)
            return *entry + 5;
    return "/usr/local/bin:/usr/bin:/bin";
}

static bool try_next(int error)
{
    return error == ENOENT || error == ENOTDIR || error == EACCES || error == ENAMETOOLONG || error == ELOOP;
}

/* As execvpe, but a file that the kernel does not know how to run is not handed to a shell. */
static void search_and_exec(const char *name)
{
    static char path[PATH_BYTES_MAX];
    size_t name_length = strlen(name);
    int remembered = ENOENT;
    const char *folder = search_path();
    for (;;) {
        size_t length = strcspn(folder, ":");
        size_t slash = length == 0 ? 0 : 1;
        if (length + slash + name_length < sizeof path) {
            memcpy(path, folder, length);
            memcpy(path + length, "/", slash);
            memcpy(path + length + slash, name, name_length + 1);
            (void)execve(path, launch.argv, launch.env);
            if (!try_next(errno))
                return;
            if (errno == EACCES)
                remembered = EACCES;
        }
        if (folder[length] == 0)
            break;
        folder += length + 1;
    }
    errno = remembered;
}

static void enter_session(void)
{
    if (setsid() < 0)
        give_up(STAGE_SESSION);
    if ((launch.flags & SPAWN_PTY) != 0 && ioctl(launch.descriptors[0], TIOCSCTTY, 0) != 0)
        give_up(STAGE_SESSION);
    /* Init's own 0, 1 and 2 are always open, so these numbers are above 2 and the copies lose close-on-exec. */
    for (int i = 0; i < 3; i++)
        if (dup2(launch.descriptors[i], i) < 0)
            give_up(STAGE_DESCRIPTORS);
}

static _Noreturn void become_command(void)
{
    sigset_t none;
    enter_session();
    for (size_t i = 0; i < launch.rlimit_count; i++)
        if (syscall(SYS_prlimit64, 0, launch.rlimits[i].resource, &launch.rlimits[i].limit, NULL) != 0)
            give_up(STAGE_RLIMIT);
    if (chdir(launch.cwd) != 0)
        give_up(STAGE_CHDIR);
    (void)sigemptyset(&none);
    (void)sigprocmask(SIG_SETMASK, &none, NULL);
    if (launch.argv[0][0] == 0)
        errno = ENOENT;
    else if (strchr(launch.argv[0], '/') != NULL)
        (void)execve(launch.argv[0], launch.argv, launch.env);
    else
        search_and_exec(launch.argv[0]);
    give_up(STAGE_EXEC);
}

static void keeper_wait(pid_t main_pid, uint64_t started_ns, struct report *report)
{
    struct rusage rusage;
    int status = 0;
    for (;;) {
        pid_t pid = wait4(-1, &status, 0, &rusage);
        if (pid < 0 && errno != EINTR)
            break;
        if (pid != main_pid)
            continue;
        report->kind = REPORT_EXITED;
        report->value = status;
        report->usage = usage_of(&rusage, started_ns);
        siginfo_t other;
        if (waitid(P_ALL, 0, &other, WEXITED | WNOHANG | WNOWAIT) != 0)
            break; /* nothing below us: both reports go as one */
        (void)!write(report_write_fd, report, sizeof *report);
        report->kind = REPORT_GONE;
    }
}

/* In a child: what is init's alone. */
static void close_own(void)
{
    close_fd(&listen_fd);
    close_fd(&signal_fd);
    close_fd(&epoll_fd);
    close_fd(&reserve_fd);
    close_fd(&report_read_fd);
    for (size_t i = 0; i < CONNECTIONS_MAX; i++)
        close_fd(&connections[i].fd);
    for (size_t i = 0; i < commands_end; i++)
        if (commands[i].state != FREE) {
            close_fd(&commands[i].pty_master);
            close_fd(&commands[i].kept_master);
        }
    for (size_t i = 0; i < WORKERS_MAX; i++)
        close_fd(&workers[i].fd);
}

/* In a child: PID 1 takes its namespace with it, otherwise this does. */
static void die_with_parent(void)
{
    if (is_pid1)
        return;
    (void)prctl(PR_SET_PDEATHSIG, (unsigned long)SIGKILL, 0UL, 0UL, 0UL);
    if (getppid() != own_pid)
        _exit(1);
}

static void keeper_setup(void)
{
    (void)prctl(PR_SET_CHILD_SUBREAPER, 1UL, 0UL, 0UL, 0UL);
    (void)prctl(PR_SET_NAME, "sandbox-keeper", 0UL, 0UL, 0UL);
    die_with_parent();
    close_fd(&proc_fd);
    close_own();
}

static _Noreturn void keep(uint32_t slot)
{
    struct report reports[2] = {{.id = launch.id, .slot = slot}};
    keeper_setup();
    uint64_t started_ns = now_ns();
    pid_t pid = vfork();
    if (pid == 0)
        become_command();
    if (pid < 0) {
        start_error = errno;
        start_stage = STAGE_FORK;
    }
    for (int i = 0; i < 3; i++)
        if (i == 0 || launch.descriptors[i] != launch.descriptors[0])
            (void)close(launch.descriptors[i]);
    if (start_stage != 0) {
        if (pid > 0)
            (void)waitpid(pid, NULL, 0);
        reports[0].kind = REPORT_FAILED;
        reports[0].value = start_error;
        reports[0].stage = start_stage;
        keeper_report(reports, 1);
    }
    reports[0].kind = REPORT_SPAWNED;
    reports[0].value = pid;
    (void)!write(report_write_fd, &reports[0], sizeof reports[0]);
    keeper_wait(pid, started_ns, &reports[0]);
    if (reports[0].kind == REPORT_GONE)
        keeper_report(reports, 1);
    reports[1] = reports[0];
    reports[1].kind = REPORT_GONE;
    keeper_report(reports, 2);
}

/* ---- connections -------------------------------------------------------------------------------------- */

static void drop_connection(int index)
{
    unsigned bit = 1U << index;
    /* A keeper that was just forked may hold a copy for a moment, so closing alone does not end the watch. */
    (void)watch(EPOLL_CTL_DEL, connections[index].fd, 0, 0);
    close_fd(&connections[index].fd);
    for (size_t i = 0; i < commands_end; i++) {
        struct command *command = &commands[i];
        command->exited_due &= (uint8_t)~bit;
        command->gone_due &= (uint8_t)~bit;
        if (command->state == FREE || command->reply_to != index)
            continue;
        command->reply_to = -1;
        master_delivered(command);
        if (command->state == FAILED)
            release(command);
    }
}

/* Sends what `out` holds. False: it could not be sent; the connection is then blocked or gone. */
static bool send_out(int index, int descriptor)
{
    if (send_message(connections[index].fd, descriptor, MSG_DONTWAIT) == 0)
        return true;
    /* ENOBUFS, ENOMEM and ETOOMANYREFS pass, like a full socket. */
    if (errno == EAGAIN || errno == ENOBUFS || errno == ENOMEM || errno == ETOOMANYREFS)
        set_blocked(index, true);
    else
        drop_connection(index);
    return false;
}

/* Answers a request that was just read. Its socket had room then, so a failure means a peer beyond help. */
static void answer(int index)
{
    if (!send_out(index, -1) && connections[index].fd >= 0)
        drop_connection(index);
}

static void put_error(uint32_t request_id, int error, enum stage stage)
{
    begin(ERROR, request_id);
    put((uint32_t)error, 4);
    put((uint32_t)stage, 4);
}

static void refuse(int index, uint32_t request_id, int error, enum stage stage)
{
    put_error(request_id, error, stage);
    answer(index);
}

static void acknowledge(int index, uint32_t type, uint32_t request_id)
{
    begin(REPLY | type, request_id);
    answer(index);
}

static bool flush_spawn_reply(int index, struct command *command)
{
    if (command->state == FAILED) {
        put_error(command->reply_id, command->status, command->stage);
    } else {
        begin(REPLY | SPAWN, command->reply_id);
        put((uint32_t)command->pid, 4);
        put(command->pty_master >= 0 ? SPAWN_PTY : 0, 4);
    }
    if (!send_out(index, command->pty_master))
        return false;
    command->reply_to = -1;
    master_delivered(command);
    if (command->state == FAILED)
        release(command);
    return true;
}

static bool flush_command(int index, struct command *command)
{
    uint8_t bit = (uint8_t)(1U << index);
    if (command->reply_to == index && command->state != STARTING && !flush_spawn_reply(index, command))
        return false;
    if ((command->exited_due & bit) != 0) {
        begin(EVENT_EXITED, 0);
        put(command->id, 8);
        put((uint32_t)command->status, 4);
        put(command->flags & EXITED_STATUS_UNKNOWN, 4);
        put_usage(&command->usage);
        if (!send_out(index, -1))
            return false;
        command->exited_due &= (uint8_t)~bit;
    }
    if ((command->gone_due & bit) != 0) {
        begin(EVENT_GONE, 0);
        put(command->id, 8);
        put(command->flags & GONE_KEEPER_LOST, 4);
        if (!send_out(index, -1))
            return false;
        command->gone_due &= (uint8_t)~bit;
    }
    return true;
}

static void flush_all(void)
{
    for (int index = 0; index < CONNECTIONS_MAX; index++)
        for (size_t i = 0; i < commands_end; i++) {
            if (connections[index].fd < 0 || connections[index].blocked)
                break;
            if (commands[i].state != FREE && !flush_command(index, &commands[i]))
                break;
        }
}

static bool is_peer(int fd)
{
    struct ucred peer;
    socklen_t length = sizeof peer;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0)
        return false;
    return is_pid1 ? peer.pid == 0 : peer.uid == getuid();
}

static int place_for_connection(void)
{
    int blocked = -1;
    for (int i = 0; i < CONNECTIONS_MAX; i++) {
        if (connections[i].fd < 0)
            return i;
        if (connections[i].blocked)
            blocked = i;
    }
    if (blocked >= 0)
        drop_connection(blocked);
    return blocked;
}

/* Out of descriptors: who waits in the backlog would wake us all the time. */
static void pause_accept(void)
{
    accept_next_ns = now_ns() + ACCEPT_PAUSE_MS * NS_PER_MS;
    (void)watch(EPOLL_CTL_MOD, listen_fd, 0, WAKE_LISTEN);
}

static void accept_connection(void)
{
    int fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
        if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS)
            pause_accept();
        return;
    }
    int place = is_peer(fd) ? place_for_connection() : -1;
    if (place < 0 || watch(EPOLL_CTL_ADD, fd, EPOLLIN, WAKE_CONNECTIONS + (uint32_t)place) != 0) {
        (void)close(fd);
        return;
    }
    connections[place] = (struct connection){.fd = fd};
}

/* ---- requests ----------------------------------------------------------------------------------------- */

static void handle_hello(int index, uint32_t request_id, struct reader *in)
{
    uint16_t lowest = take_u16(in);
    uint16_t highest = take_u16(in);
    if (!complete(in)) {
        refuse(index, request_id, EBADMSG, STAGE_REQUEST);
        return;
    }
    if (lowest > PROTOCOL_VERSION || highest < lowest || highest == 0) {
        refuse(index, request_id, EPROTONOSUPPORT, STAGE_REQUEST);
        return;
    }
    connections[index].version = highest < PROTOCOL_VERSION ? highest : PROTOCOL_VERSION;
    begin(REPLY | HELLO, request_id);
    put(connections[index].version, 2);
    put(0, 2);
    put_bytes(nonce, sizeof nonce);
    put(count_commands(), 4);
    put(COMMANDS_MAX, 4);
    put_string(PROGRAM_VERSION, sizeof PROGRAM_VERSION - 1);
    answer(index);
}

static void take_strings(struct reader *in, char **strings, size_t count)
{
    for (size_t i = 0; i < count && !in->bad; i++)
        strings[i] = take_string(in);
    strings[in->bad ? 0 : count] = NULL;
}

/* Adds what init was started with, the image's variables, to the first `count`; a name given there wins. */
static bool inherit_env(char **env, size_t count)
{
    size_t end = count;
    for (char **own = environ; *own != NULL; own++) {
        size_t name_length = strcspn(*own, "=");
        size_t i = 0;
        while (i < count && (strncmp(env[i], *own, name_length) != 0 || env[i][name_length] != '='))
            i++;
        if (i < count)
            continue;
        if (end == STRINGS_MAX)
            return false;
        env[end++] = *own;
    }
    env[end] = NULL;
    return true;
}

static bool take_launch(struct reader *in, unsigned version)
{
    uint32_t known = SPAWN_PTY | SPAWN_INHERIT_ENV | (version >= 2 ? SPAWN_KEEP_PTY : 0);
    launch.id = take_command_id(in);
    launch.flags = take_u32(in);
    launch.rows = take_u16(in);
    launch.cols = take_u16(in);
    launch.rlimit_count = take_u16(in);
    size_t argc = take_u16(in);
    size_t envc = take_u16(in);
    uint16_t zero = take_u16(in);
    if (in->bad || zero != 0 || (launch.flags & ~known) != 0 ||
        (launch.flags & (SPAWN_KEEP_PTY | SPAWN_PTY)) == SPAWN_KEEP_PTY || launch.rlimit_count > RLIMITS_MAX || argc == 0 || argc > STRINGS_MAX || envc > STRINGS_MAX)
        return false;
    for (size_t i = 0; i < launch.rlimit_count; i++) {
        launch.rlimits[i].resource = take_u32(in);
        if (take_u32(in) != 0)
            in->bad = true;
        launch.rlimits[i].limit.soft = take_u64(in);
        launch.rlimits[i].limit.hard = take_u64(in);
    }
    launch.cwd = take_string(in);
    take_strings(in, launch.argv, argc);
    take_strings(in, launch.env, envc);
    if (!complete(in))
        return false;
    return (launch.flags & SPAWN_INHERIT_ENV) == 0 || inherit_env(launch.env, envc);
}

static size_t count_pending_ptys(void)
{
    size_t count = 0;
    for (size_t i = 0; i < commands_end; i++)
        if (commands[i].state != FREE && commands[i].pty_master >= 0)
            count++;
    return count;
}

/* Opens a terminal; its slave becomes the three descriptors of the launch. Returns the master, or -1. */
static int open_pty(void)
{
    int unlocked = 0;
    struct winsize size = {.ws_row = launch.rows, .ws_col = launch.cols};
    if (count_pending_ptys() >= PTYS_PENDING_MAX) {
        errno = EAGAIN;
        return -1;
    }
    int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (master < 0)
        return -1;
    int slave = -1;
    if (ioctl(master, TIOCSPTLCK, &unlocked) == 0 && ioctl(master, TIOCSWINSZ, &size) == 0)
        slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (slave < 0) {
        int error = errno;
        (void)close(master);
        errno = error;
        return -1;
    }
    for (int i = 0; i < 3; i++)
        launch.descriptors[i] = slave;
    return master;
}

/* Forks the keeper. The answer follows when the keeper has reported. */
static void start_command(int index, uint32_t request_id, struct command *command, int master)
{
    uint64_t started_ns = now_ns();
    pid_t keeper = fork();
    if (keeper == 0) {
        close_fd(&master);
        keep((uint32_t)(command - commands));
    }
    if (keeper < 0) {
        int error = errno;
        close_fd(&master);
        refuse(index, request_id, error, STAGE_FORK);
        return;
    }
    *command = (struct command){
        .id = launch.id,
        .state = STARTING,
        .started_ns = started_ns,
        .keeper = keeper,
        .reply_to = index,
        .reply_id = request_id,
        .pty_master = master,
        .kept_master = -1,
        .keep_pty = (launch.flags & SPAWN_KEEP_PTY) != 0,
    };
    if (command >= commands + commands_end)
        commands_end = (size_t)(command - commands) + 1;
}

static void handle_spawn(int index, uint32_t request_id, struct reader *in, struct descriptors *received)
{
    struct command *slot = free_slot();
    int master = -1;
    if (!take_launch(in, connections[index].version)) {
        refuse(index, request_id, EBADMSG, STAGE_REQUEST);
        return;
    }
    bool pty = (launch.flags & SPAWN_PTY) != 0;
    if (received->cut && received->count < DESCRIPTORS_MAX) {
        refuse(index, request_id, EMFILE, STAGE_DESCRIPTORS);
        return;
    }
    if (received->count != (pty ? 0 : 3)) {
        refuse(index, request_id, EBADMSG, STAGE_DESCRIPTORS);
        return;
    }
    int error = stopping ? ESHUTDOWN : find_command(launch.id) != NULL ? EEXIST : slot == NULL ? ENOSPC : 0;
    if (error != 0) {
        refuse(index, request_id, error, STAGE_ADMIT);
        return;
    }
    if (pty) {
        master = open_pty();
        if (master < 0) {
            refuse(index, request_id, errno, STAGE_PTY);
            return;
        }
    } else {
        memcpy(launch.descriptors, received->fd, sizeof launch.descriptors);
    }
    start_command(index, request_id, slot, master);
    if (pty)
        (void)close(launch.descriptors[0]);
}

static int signal_command(struct command *command, int signo, enum scope scope)
{
    struct hunt hunt = {.root = command->keeper, .signo = signo};
    if (command->state != RUNNING && command->state != EXITED)
        return ESRCH;
    switch (scope) {
    case SCOPE_MAIN:
        if (command->state != RUNNING)
            return ESRCH;
        return signal_process(command->pid, signo) == 0 ? 0 : errno;
    case SCOPE_GROUP:
        if (command->state == RUNNING)
            return signal_group(command->pid, signo) == 0 ? 0 : errno;
        /* The leader is gone: its number means this group only for processes found in our own tree. */
        hunt.only_group = command->pid;
        break;
    case SCOPE_TREE:
        break;
    }
    if (command->keeper == 0)
        return ESRCH;
    return walk(&hunt).living > 0 ? 0 : ESRCH;
}

static void handle_signal(int index, uint32_t request_id, struct reader *in)
{
    uint64_t id = take_command_id(in);
    uint32_t signo = take_u32(in);
    uint32_t scope = take_u32(in);
    if (!complete(in) || signo < 1 || signo > (uint32_t)SIGRTMAX || scope > SCOPE_TREE) {
        refuse(index, request_id, EBADMSG, STAGE_REQUEST);
        return;
    }
    struct command *command = find_command(id);
    int error = command == NULL ? ENOENT : signal_command(command, (int)signo, (enum scope)scope);
    if (error != 0)
        refuse(index, request_id, error, STAGE_REQUEST);
    else
        acknowledge(index, SIGNAL, request_id);
}

static void handle_kill(int index, uint32_t request_id, struct reader *in)
{
    uint64_t id = take_command_id(in);
    if (!complete(in)) {
        refuse(index, request_id, EBADMSG, STAGE_REQUEST);
        return;
    }
    struct command *command = find_command(id);
    if (command == NULL || command->state == FAILED) {
        refuse(index, request_id, ENOENT, STAGE_REQUEST);
        return;
    }
    /* First the answer: a wave over a storm of hundreds of processes takes milliseconds. */
    acknowledge(index, KILL, request_id);
    if (command->keeper != 0) {
        command->killing = true;
        wave(command);
        want_wave();
    }
}

static void handle_list(int index, uint32_t request_id, struct reader *in)
{
    size_t slot = take_u32(in);
    uint32_t count = 0;
    if (!complete(in)) {
        refuse(index, request_id, EBADMSG, STAGE_REQUEST);
        return;
    }
    begin(REPLY | LIST, request_id);
    size_t head = out.used;
    put(0, 4);
    put(0, 4);
    for (; slot < commands_end && count < LIST_PAGE_MAX; slot++) {
        const struct command *command = &commands[slot];
        if (command->state == FREE || command->state == FAILED)
            continue;
        put(command->id, 8);
        put((uint32_t)command->pid, 4);
        put((uint32_t)command->state, 4);
        put(command->flags | (connections[index].version >= 2 && command->kept_master >= 0 ? PTY_KEPT : 0), 4);
        put((uint32_t)command->status, 4);
        put_usage(&command->usage);
        count++;
    }
    size_t end = out.used;
    out.used = head;
    put(slot < commands_end ? slot : UINT32_MAX, 4);
    put(count, 4);
    out.used = end;
    answer(index);
}

static void handle_forget(int index, uint32_t request_id, struct reader *in)
{
    uint64_t id = take_command_id(in);
    if (!complete(in)) {
        refuse(index, request_id, EBADMSG, STAGE_REQUEST);
        return;
    }
    struct command *command = find_command(id);
    if (command == NULL || command->state == FAILED) {
        refuse(index, request_id, ENOENT, STAGE_REQUEST);
        return;
    }
    if (command->state != GONE || command->reply_to >= 0) {
        refuse(index, request_id, EBUSY, STAGE_REQUEST);
        return;
    }
    release(command);
    acknowledge(index, FORGET, request_id);
}

static void handle_terminal(int index, uint32_t request_id, struct reader *in)
{
    uint64_t id = take_command_id(in);
    if (connections[index].version < 2 || !complete(in)) {
        refuse(index, request_id, connections[index].version < 2 ? EOPNOTSUPP : EBADMSG, STAGE_REQUEST);
        return;
    }
    const struct command *command = find_command(id);
    if (command == NULL || command->state == FAILED || command->kept_master < 0) {
        refuse(index, request_id, command == NULL || command->state == FAILED ? ENOENT : ENOTTY, STAGE_PTY);
        return;
    }
    begin(REPLY | TERMINAL, request_id);
    if (!send_out(index, command->kept_master) && connections[index].fd >= 0)
        drop_connection(index);
}

static _Noreturn void become_worker(int fd)
{
    (void)prctl(PR_SET_NAME, "sandbox-files", 0UL, 0UL, 0UL);
    die_with_parent();
    close_fd(&report_write_fd);
    close_own();
    serve_files(fd, proc_fd);
}

/* Forks a worker on ends[1]. An errno, or 0. */
static int start_worker(struct worker *worker, const int *ends)
{
    pid_t pid = fork();
    if (pid == 0) {
        (void)close(ends[0]);
        become_worker(ends[1]);
    }
    if (pid < 0)
        return errno;
    *worker = (struct worker){.pid = pid, .fd = ends[1]};
    return 0;
}

static void handle_files(int index, uint32_t request_id, struct reader *in)
{
    struct worker *worker = find_worker(0);
    uint32_t flags = take_u32(in);
    int ends[2];
    if (!complete(in) || flags != 0) {
        refuse(index, request_id, EBADMSG, STAGE_REQUEST);
        return;
    }
    if (stopping || worker == NULL) {
        refuse(index, request_id, stopping ? ESHUTDOWN : ENOSPC, STAGE_ADMIT);
        return;
    }
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) {
        refuse(index, request_id, errno, STAGE_DESCRIPTORS);
        return;
    }
    uint32_t wake = WAKE_WORKERS + (uint32_t)(worker - workers);
    int error = watch(EPOLL_CTL_ADD, ends[1], 0, wake) != 0 ? errno : start_worker(worker, ends);
    if (error != 0) {
        (void)watch(EPOLL_CTL_DEL, ends[1], 0, 0);
        (void)close(ends[1]);
        refuse(index, request_id, error, STAGE_FORK);
    } else {
        begin(REPLY | FILES, request_id);
        put((uint32_t)worker->pid, 4);
        put(FILES_VERSION, 4);
        if (!send_out(index, ends[0]) && connections[index].fd >= 0)
            drop_connection(index);
    }
    (void)close(ends[0]);
}

static socklen_t loopback(struct sockaddr_storage *address, uint32_t flags, uint16_t port)
{
    memset(address, 0, sizeof *address);
    if ((flags & LOOPBACK_IPV6) != 0) {
        struct sockaddr_in6 v6 = {
            .sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = IN6ADDR_LOOPBACK_INIT};
        memcpy(address, &v6, sizeof v6);
        return sizeof v6;
    }
    struct sockaddr_in v4 = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    memcpy(address, &v4, sizeof v4);
    return sizeof v4;
}

/* A socket that listens on a port, or that connects, or has connected, to one. Returns -1 with errno. */
static int open_socket(uint16_t type, uint32_t flags, uint16_t port)
{
    struct sockaddr_storage address;
    const struct sockaddr *where = (const struct sockaddr *)&address;
    socklen_t length = loopback(&address, flags, port);
    int on = 1;
    int fd = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    bool done;
    if (type == LISTEN)
        done = setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0 && bind(fd, where, length) == 0 &&
               listen(fd, LISTEN_BACKLOG) == 0;
    else
        done = connect(fd, where, length) == 0 || errno == EINPROGRESS;
    if (!done) {
        int error = errno;
        (void)close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

static void handle_socket(int index, uint16_t type, uint32_t request_id, struct reader *in)
{
    uint32_t flags = take_u32(in);
    uint16_t port = take_u16(in);
    uint16_t zero = take_u16(in);
    if (!complete(in) || (flags & ~LOOPBACK_IPV6) != 0 || port == 0 || zero != 0) {
        refuse(index, request_id, EBADMSG, STAGE_REQUEST);
        return;
    }
    if (stopping) {
        refuse(index, request_id, ESHUTDOWN, STAGE_ADMIT);
        return;
    }
    int fd = open_socket(type, flags, port);
    if (fd < 0) {
        refuse(index, request_id, errno, STAGE_SOCKET);
        return;
    }
    begin(REPLY | type, request_id);
    if (!send_out(index, fd) && connections[index].fd >= 0)
        drop_connection(index);
    (void)close(fd);
}

static void dispatch(int index, struct reader *in, struct descriptors *received)
{
    uint16_t magic = take_u16(in);
    uint16_t type = take_u16(in);
    uint32_t request_id = take_u32(in);
    if (in->bad || magic != MAGIC) {
        drop_connection(index);
        return;
    }
    if (type != SPAWN && (received->count > 0 || received->cut)) {
        refuse(index, request_id, EBADMSG, STAGE_DESCRIPTORS);
        return;
    }
    if (type != HELLO && connections[index].version == 0) {
        refuse(index, request_id, EPROTO, STAGE_REQUEST);
        return;
    }
    switch (type) {
    case HELLO:
        handle_hello(index, request_id, in);
        break;
    case SPAWN:
        handle_spawn(index, request_id, in, received);
        break;
    case SIGNAL:
        handle_signal(index, request_id, in);
        break;
    case KILL:
        handle_kill(index, request_id, in);
        break;
    case LIST:
        handle_list(index, request_id, in);
        break;
    case FORGET:
        handle_forget(index, request_id, in);
        break;
    case TERMINAL:
        handle_terminal(index, request_id, in);
        break;
    case FILES:
        handle_files(index, request_id, in);
        break;
    case LISTEN:
    case DIAL:
        handle_socket(index, type, request_id, in);
        break;
    default:
        refuse(index, request_id, EOPNOTSUPP, STAGE_REQUEST);
        break;
    }
}

static void collect_descriptors(struct msghdr *message, struct descriptors *received)
{
    received->cut = (message->msg_flags & MSG_CTRUNC) != 0;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part != NULL; part = CMSG_NXTHDR(message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count && received->count < DESCRIPTORS_MAX; i++)
            memcpy(&received->fd[received->count++], CMSG_DATA(part) + i * sizeof(int), sizeof(int));
    }
}

static void read_request(int index)
{
    struct iovec part = {.iov_base = inbox, .iov_len = sizeof inbox};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(DESCRIPTORS_MAX * sizeof(int))];
    } control;
    struct msghdr message = {
        .msg_iov = &part,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = sizeof control.space,
    };
    struct descriptors received = {.count = 0};
    ssize_t got = recvmsg(connections[index].fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0) {
        if (errno != EAGAIN && errno != EINTR && errno != ENOMEM && errno != ENOBUFS)
            drop_connection(index);
        return;
    }
    collect_descriptors(&message, &received);
    if (got == 0 || (message.msg_flags & MSG_TRUNC) != 0) {
        drop_connection(index);
    } else {
        struct reader in = {.at = inbox, .left = (size_t)got};
        dispatch(index, &in, &received);
    }
    for (size_t i = 0; i < received.count; i++)
        (void)close(received.fd[i]);
}

static void serve_connection(int index, uint32_t events)
{
    struct connection *connection = &connections[index];
    if (connection->blocked) {
        if ((events & (EPOLLHUP | EPOLLERR)) != 0)
            drop_connection(index);
        else
            set_blocked(index, false);
        return;
    }
    /* A quarter of a socket's buffer is free, or more, when it polls as writable: enough for any reply. */
    struct pollfd room = {.fd = connection->fd, .events = POLLOUT};
    if (poll(&room, 1, 0) == 1 && (room.revents & POLLOUT) != 0)
        read_request(index);
    else if ((room.revents & (POLLHUP | POLLERR)) != 0)
        drop_connection(index);
    else
        set_blocked(index, true);
}

/* ---- the loop ----------------------------------------------------------------------------------------- */

static void read_signals(void)
{
    struct signalfd_siginfo info;
    while (read(signal_fd, &info, sizeof info) == (ssize_t)sizeof info) {
        /* From a command, si_pid is the command's. A forged siginfo cannot carry SI_USER. */
        bool from_outside = info.ssi_code == SI_USER && info.ssi_pid == 0;
        if (info.ssi_signo == (uint32_t)SIGTERM && (from_outside || !is_pid1))
            begin_stop();
    }
    reap();
}

static int until(uint64_t deadline_ns, int timeout_ms)
{
    uint64_t now = now_ns();
    int left = deadline_ns <= now ? 0 : (int)((deadline_ns - now + NS_PER_MS - 1) / NS_PER_MS);
    return timeout_ms < 0 || left < timeout_ms ? left : timeout_ms;
}

static int wait_ms(void)
{
    int timeout_ms = -1;
    if (anything_to_kill())
        timeout_ms = until(wave_next_ns, timeout_ms);
    if (accept_next_ns != 0)
        timeout_ms = until(accept_next_ns, timeout_ms);
    for (size_t i = 0; i < WORKERS_MAX; i++)
        if (workers[i].kill_at_ns != 0)
            timeout_ms = until(workers[i].kill_at_ns, timeout_ms);
    return timeout_ms;
}

static void handle_wake(uint32_t wake, uint32_t events)
{
    switch (wake) {
    case WAKE_REPORTS:
        drain_reports();
        break;
    case WAKE_SIGNALS:
        read_signals();
        break;
    case WAKE_LISTEN:
        accept_connection();
        break;
    default:
        if (wake >= WAKE_WORKERS) {
            worker_hung_up(&workers[wake - WAKE_WORKERS]);
            break;
        }
        /* It may be gone, or another one by now, by what was handled before: then reading finds nothing. */
        if (connections[wake - WAKE_CONNECTIONS].fd >= 0)
            serve_connection((int)(wake - WAKE_CONNECTIONS), events);
        break;
    }
}

static void turn(void)
{
    struct epoll_event events[WAKE_END];
    int count = epoll_wait(epoll_fd, events, WAKE_END, wait_ms());
    for (int i = 0; i < count; i++)
        handle_wake(events[i].data.u32, events[i].events);
    if (accept_next_ns != 0 && now_ns() >= accept_next_ns) {
        accept_next_ns = 0;
        (void)watch(EPOLL_CTL_MOD, listen_fd, EPOLLIN, WAKE_LISTEN);
    }
    kill_overdue_workers();
    if (anything_to_kill() && now_ns() >= wave_next_ns)
        run_waves();
    flush_all();
}

/* ---- start -------------------------------------------------------------------------------------------- */

static _Noreturn void die(const char *what)
{
    (void)dprintf(STDERR_FILENO, "sandbox-init: cannot %s: %s\n", what, strerror(errno));
    exit(1);
}

static void close_everything_above_2(void)
{
    DIR *folder = opendir("/proc/self/fd");
    if (folder == NULL)
        die("open /proc/self/fd");
    int own = dirfd(folder);
    const struct dirent *entry;
    while ((entry = readdir(folder)) != NULL) {
        const char *name = entry->d_name;
        if (*name < '0' || *name > '9')
            continue;
        int fd = (int)take_decimal(&name);
        if (fd > STDERR_FILENO && fd != own)
            (void)close(fd);
    }
    (void)closedir(folder);
}

static void open_standard_descriptors(void)
{
    int fd;
    do {
        fd = open("/dev/null", O_RDWR);
        if (fd < 0)
            die("open /dev/null");
    } while (fd <= STDERR_FILENO);
    (void)close(fd);
}

static void take_signals(void)
{
    sigset_t all;
    for (int signo = 1; signo <= SIGRTMAX; signo++)
        (void)signal(signo, SIG_DFL);
    (void)sigfillset(&all);
    if (sigprocmask(SIG_SETMASK, &all, NULL) != 0)
        die("block signals");
    sigset_t wanted;
    (void)sigemptyset(&wanted);
    (void)sigaddset(&wanted, SIGCHLD);
    (void)sigaddset(&wanted, SIGTERM);
    signal_fd = signalfd(-1, &wanted, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signal_fd < 0)
        die("open a signalfd");
}

/* Mode 0666: under a user namespace the daemon is neither this uid nor root to the kernel. Who may come is
 * decided by the 0700 directory above on the host, and by is_peer inside. */
static void listen_in(const char *directory)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "init.sock"};
    if (chdir(directory) != 0)
        die("enter the socket's directory");
    if (unlink(address.sun_path) != 0 && errno != ENOENT)
        die("remove a stale init.sock");
    listen_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (listen_fd < 0)
        die("open a socket");
    mode_t mask = umask(0111);
    if (bind(listen_fd, (const struct sockaddr *)&address, sizeof address) != 0)
        die("bind init.sock");
    (void)umask(mask);
    if (listen(listen_fd, 2 * CONNECTIONS_MAX) != 0)
        die("listen on init.sock");
    if (chdir("/") != 0)
        die("return to /");
}

static void open_reports(void)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0)
        die("open a pipe");
    report_read_fd = ends[0];
    report_write_fd = ends[1];
    if (fcntl(report_read_fd, F_SETFL, O_NONBLOCK) != 0)
        die("set up a pipe");
}

#if defined(__x86_64__)
#define OTHER_ABI AUDIT_ARCH_I386
enum { X32_BIT = 0x40000000, OTHER_PRLIMIT = 340, OTHER_SETATTR = 351 };
#elif defined(__aarch64__)
#define OTHER_ABI AUDIT_ARCH_ARM
enum { X32_BIT = 0, OTHER_PRLIMIT = 369, OTHER_SETATTR = 380 };
#else
#define OTHER_ABI 0 /* of other architectures only the native calls are known here */
enum { X32_BIT = 0, OTHER_PRLIMIT = 0, OTHER_SETATTR = 0 };
#endif
enum { OTHER_SETPRIORITY = 97, OTHER_SETPARAM = 154, OTHER_SETSCHEDULER = 156, OTHER_SETAFFINITY = 241 };

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define LOAD_ARGUMENT(n) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[n]) + LOW_HALF)
#define IF_SKIP(value, then, otherwise) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), (then), (otherwise))
#define ANSWER(action) BPF_STMT(BPF_RET | BPF_K, (action))
#define LOW_HALF (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 0 : 4)

/* Refuses system calls that change init's limits or scheduling; see the theory of operation. Without
 * no-new-privileges the kernel does not let us; whoever leaves that out has given up more than this guards. */
static void guard_own_process(void)
{
    const uint32_t self = (uint32_t)own_pid;
    struct sock_filter steps[] = {
        /*  0 */ LOAD(arch),
        /*  1 */ IF_SKIP(OTHER_ABI, 9, 0),
        /*  2 */ LOAD(nr),
        /*  3 */ BPF_STMT(BPF_ALU | BPF_AND | BPF_K, ~(uint32_t)X32_BIT),
        /*  4 */ IF_SKIP(SYS_prlimit64, 14, 0),
        /*  5 */ IF_SKIP(SYS_sched_setparam, 13, 0),
        /*  6 */ IF_SKIP(SYS_sched_setscheduler, 12, 0),
        /*  7 */ IF_SKIP(SYS_sched_setaffinity, 11, 0),
        /*  8 */ IF_SKIP(SYS_sched_setattr, 10, 0),
        /*  9 */ IF_SKIP(SYS_setpriority, 12, 0),
        /* 10 */ ANSWER(SECCOMP_RET_ALLOW),
        /* 11 */ LOAD(nr),
        /* 12 */ IF_SKIP(OTHER_PRLIMIT, 6, 0),
        /* 13 */ IF_SKIP(OTHER_SETPARAM, 5, 0),
        /* 14 */ IF_SKIP(OTHER_SETSCHEDULER, 4, 0),
        /* 15 */ IF_SKIP(OTHER_SETAFFINITY, 3, 0),
        /* 16 */ IF_SKIP(OTHER_SETATTR, 2, 0),
        /* 17 */ IF_SKIP(OTHER_SETPRIORITY, 4, 0),
        /* 18 */ ANSWER(SECCOMP_RET_ALLOW),
        /* 19 */ LOAD_ARGUMENT(0), /* a pid */
        /* 20 */ IF_SKIP(self, 6, 0),
        /* 21 */ ANSWER(SECCOMP_RET_ALLOW),
        /* 22 */ LOAD_ARGUMENT(0), /* setpriority: of which kind is the number that follows */
        /* 23 */ IF_SKIP(PRIO_USER, 3, 0),
        /* 24 */ LOAD_ARGUMENT(1),
        /* 25 */ IF_SKIP(self, 1, 0),
        /* 26 */ ANSWER(SECCOMP_RET_ALLOW),
        /* 27 */ ANSWER(SECCOMP_RET_ERRNO | EPERM),
    };
    struct sock_fprog filter = {.len = sizeof steps / sizeof steps[0], .filter = steps};
    if (prctl(PR_SET_SECCOMP, (unsigned long)SECCOMP_MODE_FILTER, &filter, 0UL, 0UL) != 0)
        (void)dprintf(STDERR_FILENO, "sandbox-init: runs without its own guard: %s\n", strerror(errno));
}

static void open_epoll(void)
{
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0 || watch(EPOLL_CTL_ADD, report_read_fd, EPOLLIN, WAKE_REPORTS) != 0 ||
        watch(EPOLL_CTL_ADD, signal_fd, EPOLLIN, WAKE_SIGNALS) != 0 ||
        watch(EPOLL_CTL_ADD, listen_fd, EPOLLIN, WAKE_LISTEN) != 0)
        die("set up epoll");
}

static void start(const char *directory)
{
    own_pid = getpid();
    own_group = getpgrp();
    if (prctl(PR_SET_DUMPABLE, 0UL, 0UL, 0UL, 0UL) != 0)
        die("become undumpable");
    if (!is_pid1 && prctl(PR_SET_CHILD_SUBREAPER, 1UL, 0UL, 0UL, 0UL) != 0)
        die("become a subreaper");
    close_everything_above_2();
    open_standard_descriptors();
    take_signals();
    open_reports();
    proc_fd = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (proc_fd < 0)
        die("open /proc");
    reserve_fd = fcntl(proc_fd, F_DUPFD_CLOEXEC, 3);
    if (getrandom(nonce, sizeof nonce, 0) != (ssize_t)sizeof nonce)
        die("draw a nonce");
    for (size_t i = 0; i < CONNECTIONS_MAX; i++)
        connections[i].fd = -1;
    for (size_t i = 0; i < WORKERS_MAX; i++)
        workers[i].fd = -1;
    listen_in(directory);
    open_epoll();
    guard_own_process();
}

/* Prints which directory a path is in here: the daemon compares, to see whether the mount that it asked for came. */
static int print_identity(const char *path)
{
    struct stat status;
    if (stat(path, &status) != 0) {
        (void)dprintf(STDERR_FILENO, "sandbox-init: cannot stat %s: %s\n", path, strerror(errno));
        return 1;
    }
    (void)printf("%ju %ju\n", (uintmax_t)status.st_dev, (uintmax_t)status.st_ino);
    return 0;
}

int main(int argc, char **argv)
{
    int first = 1;
    if (argc == 3 && strcmp(argv[1], "--identity") == 0)
        return print_identity(argv[2]);
    if (argc == 2 && strcmp(argv[1], "--version") == 0) {
        (void)printf("sandbox-init %s protocol %u\n", PROGRAM_VERSION, PROTOCOL_VERSION);
        return 0;
    }
    is_pid1 = getpid() == 1;
    if (argc > 1 && strcmp(argv[1], "--no-pid1") == 0) {
        is_pid1 = false;
        first = 2;
    } else if (!is_pid1) {
        (void)dprintf(STDERR_FILENO, "sandbox-init: cannot run: this is not PID 1 of a container\n");
        return 2;
    }
    if (argc != first + 1 || argv[first][0] == '-') {
        (void)dprintf(STDERR_FILENO, "usage: sandbox-init [--no-pid1] DIRECTORY | --identity PATH | --version\n");
        return 2;
    }
    start(argv[first]);
    while (!stopping || !all_stopped())
        turn();
    return 0;
}
