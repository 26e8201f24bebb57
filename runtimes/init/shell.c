/*
 * sandbox-shell: a shell that keeps its state from one text to the next.
 *
 *     sandbox-shell open SHELL [NAME]   run SHELL and hold the two pipes that lead to it, until it ends
 *     sandbox-shell run HOST            let the shell of the process HOST evaluate the text that stdin holds
 *
 * Theory of operation. "open" starts an interactive shell without a terminal, for only an interactive one survives an
 * error and comes back from SIGINT. Its stdin is a pipe, on which it is told what to do, line by line; what it says
 * outside of a run goes nowhere. The host keeps that pipe, and a second one for what the shell reports. It holds them
 * under fixed numbers, so that whoever comes later, after a restart of the daemon too, finds them in its /proc/PID/fd;
 * the shell inherits neither.
 *
 * "run" puts the text into a file without a name, makes two pipes, and writes two lines to the shell: to source the
 * file with the pipes for stdout and stderr, and, on a line of its own since an error or an interrupt drops the rest
 * of the first, to report. So no output can be taken for a report: they never share a descriptor, and a report counts
 * only with the token that was drawn for this run. The redirections hold for the sourcing alone: whatever the text does
 * to its descriptors is undone after it.
 *
 * What the pipes deliver is copied to stdout and stderr. When the report is in, what was written before it is copied,
 * and the program exits with the status of the text. If something in the background still holds a pipe, a child goes
 * on copying. With the report comes what the shell exports, and where it is: both are handed out on stdin, which is a
 * socket, as the length of the directory's path in four bytes, the path, and the text that exports again.
 *
 * SIGINT interrupts the text as a terminal would. SIGTERM and SIGUSR1 also end, by TERM and by KILL, all processes of
 * the shell that began after this program, so that what earlier texts left in the background stays.
 *
 *     exit STATUS   the status of the text
 *     SIGABRT       there will be none: the shell has ended, or cannot be reached
 */

#define _GNU_SOURCE

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    USAGE = 2,
    NOT_FOUND = 127,
    HOST_CONTROL = 10, /* numbers that a shell script cannot name in a redirection */
    HOST_REPORT_READ = 11,
    HOST_REPORT_WRITE = 12,
    HOST_CONTROL_READ = 13,
    COPY_BYTES_MAX = 64 * 1024,
    REPORT_BYTES_MAX = 64 * 1024,
    PROCESSES_MAX = 32768,
    DEPTH_MAX = 4096,
    KILL_WAVES_MAX = 64,
    OPEN_TRIES_MAX = 1000, /* 2 s */
    ASK_AGAIN_MS = 50,
    LOOK_FIRST_MS = 250,
    LOOK_LAST_MS = 4000,
    ASKS_MAX = 4,
    TOKEN_CHARS = 32
};

/* ---- the host of a shell ------------------------------------------------------------------------------ */

/* By "command", for an error of dash's own set would drop what follows, the first run among it. */
static const char BEGINNING[] = "PS1= PS2= PS4='+ '\n"
                                "command unset HISTFILE PROMPT_COMMAND MAILCHECK\n"
                                "command set +o history\n"
                                "command set +o histexpand\n";

static bool is_bash(const char *shell)
{
    char real[PATH_MAX];
    const char *path = realpath(strcmp(shell, "sh") == 0 ? "/bin/sh" : shell, real);
    const char *name = path == NULL ? shell : path;
    const char *slash = strrchr(name, '/');
    return strcmp(slash == NULL ? name : slash + 1, "bash") == 0;
}

static void exec_shell(const char *shell, int control, int null)
{
    char path[64];
    if (is_bash(shell)) {
        const char *slash = strrchr(shell, '/');
        (void)dup2(control, 0);
        (void)execlp(shell, slash == NULL ? shell : slash + 1, "--noprofile", "--norc", "--noediting", "-i", NULL);
        (void)dup2(null, 0);
        return;
    }
    /* Not by stdin: busybox would read that with fgets, and take the end of a child for the end of the file. */
    (void)snprintf(path, sizeof path, "/proc/%d/fd/%d", getppid(), HOST_CONTROL_READ);
    (void)execlp(shell, "sh", "-i", path, (char *)NULL);
}

static _Noreturn void be_shell(const char *shell, int control)
{
    sigset_t none;
    (void)sigemptyset(&none);
    (void)sigprocmask(SIG_SETMASK, &none, NULL);
    for (int signo = 1; signo < NSIG; signo++)
        (void)signal(signo, SIG_DFL); /* a shell cannot trap what it was born to ignore */
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0)
        _exit(NOT_FOUND);
    (void)unsetenv("ENV");
    (void)unsetenv("BASH_ENV");
    if (strcmp(shell, "auto") == 0) {
        exec_shell("bash", control, null);
        exec_shell("sh", control, null);
    } else {
        exec_shell(shell, control, null);
    }
    _exit(NOT_FOUND);
}

static int host(const char *shell)
{
    int control[2];
    int report[2];
    if (pipe2(control, O_CLOEXEC) != 0 || pipe2(report, O_CLOEXEC) != 0 ||
        dup3(control[1], HOST_CONTROL, O_CLOEXEC) < 0 || dup3(report[0], HOST_REPORT_READ, O_CLOEXEC) < 0 ||
        dup3(report[1], HOST_REPORT_WRITE, O_CLOEXEC) < 0 || dup3(control[0], HOST_CONTROL_READ, O_CLOEXEC) < 0)
        return NOT_FOUND;
    if (write(control[1], BEGINNING, sizeof BEGINNING - 1) < 0)
        return NOT_FOUND;
    pid_t child = fork();
    if (child < 0)
        return NOT_FOUND;
    if (child == 0)
        be_shell(shell, control[0]);
    /* An interrupt goes to the group, in which the host is too. */
    (void)signal(SIGINT, SIG_IGN);
    (void)signal(SIGQUIT, SIG_IGN);
    (void)signal(SIGHUP, SIG_IGN);
    int status = 0;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            return NOT_FOUND;
    if (WIFSIGNALED(status)) {
        (void)signal(WTERMSIG(status), SIG_DFL);
        (void)raise(WTERMSIG(status));
        return 128 + WTERMSIG(status);
    }
    return WEXITSTATUS(status);
}

/* ---- the processes of a shell ------------------------------------------------------------------------- */

struct process {
    pid_t pid;
    pid_t parent;
    unsigned long long started; /* clock ticks since boot */
};

static struct process processes[PROCESSES_MAX];
static size_t process_count;

static bool read_process(const char *pid, struct process *out)
{
    char path[64];
    char text[1024];
    (void)snprintf(path, sizeof path, "/proc/%s/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t got = read(fd, text, sizeof text - 1);
    (void)close(fd);
    if (got <= 0)
        return false;
    text[got] = '\0';
    /* The name, in parentheses, may hold anything, parentheses too. */
    char *after = strrchr(text, ')');
    if (after == NULL)
        return false;
    char state = 0;
    int parent = 0;
    if (sscanf(after + 1,
               " %c %d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
               &state,
               &parent,
               &out->started) != 3 ||
        state == 'Z' || state == 'X')
        return false;
    out->pid = (pid_t)strtol(pid, NULL, 10);
    out->parent = (pid_t)parent;
    return true;
}

static void read_processes(void)
{
    process_count = 0;
    DIR *proc = opendir("/proc");
    if (proc == NULL)
        return;
    struct dirent *entry = NULL;
    while (process_count < PROCESSES_MAX && (entry = readdir(proc)) != NULL)
        if (entry->d_name[0] >= '1' && entry->d_name[0] <= '9' &&
            read_process(entry->d_name, &processes[process_count]))
            process_count++;
    (void)closedir(proc);
}

static const struct process *find_process(pid_t pid)
{
    for (size_t i = 0; i < process_count; i++)
        if (processes[i].pid == pid)
            return &processes[i];
    return NULL;
}

static bool descends(const struct process *process, pid_t ancestor)
{
    for (int depth = 0; process != NULL && depth < DEPTH_MAX; depth++) {
        if (process->parent == ancestor)
            return true;
        process = process->parent <= 1 ? NULL : find_process(process->parent);
    }
    return false;
}

/* Of two that began in the same tick, the higher pid is the younger. */
static bool younger(const struct process *process, const struct process *than)
{
    return process->started == than->started ? process->pid > than->pid : process->started > than->started;
}

/* Signal what the shell of `host` has running that is younger than `own`, and neither of the two; says how many there were. */
static size_t signal_run(pid_t host_pid, const struct process *own, int signo)
{
    size_t signalled = 0;
    read_processes();
    const struct process *own_host = find_process(host_pid);
    if (own_host == NULL || own_host->parent <= 1)
        return 0;
    pid_t keeper = own_host->parent;
    for (size_t i = 0; i < process_count; i++) {
        const struct process *process = &processes[i];
        if (process->pid <= 1 || process->pid == host_pid || process->parent == host_pid || !younger(process, own) ||
            !descends(process, keeper))
            continue;
        if (kill(process->pid, signo) == 0)
            signalled++;
        if (signo != SIGKILL)
            (void)kill(process->pid, SIGCONT);
    }
    return signalled;
}

static void kill_run(pid_t host_pid, const struct process *own)
{
    const struct timespec pause = {.tv_nsec = 2 * 1000 * 1000};
    for (int wave = 0; wave < KILL_WAVES_MAX && signal_run(host_pid, own, SIGKILL) > 0; wave++)
        (void)nanosleep(&pause, NULL);
}

static void interrupt(pid_t host_pid)
{
    pid_t group = getpgid(host_pid);
    if (group <= 1)
        return;
    (void)kill(-group, SIGCONT);
    (void)kill(-group, SIGINT);
}

/* ---- a run -------------------------------------------------------------------------------------------- */

struct stream {
    int from; /* -1: at its end */
    int to;
    int writer; /* kept open until the shell has it */
};

static struct stream streams[2] = {{-1, 1, -1}, {-1, 2, -1}};
static char token[TOKEN_CHARS + 1];
static char text[COPY_BYTES_MAX];
static char report[REPORT_BYTES_MAX];
static size_t report_bytes;
static bool report_cut;

static _Noreturn void fail(const char *what)
{
    (void)fprintf(stderr, "sandbox-shell: cannot %s: %s\n", what, strerror(errno));
    (void)signal(SIGABRT, SIG_DFL);
    abort();
}

static bool write_all(int fd, const char *data, size_t length)
{
    while (length > 0) {
        ssize_t written = write(fd, data, length);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0)
            return false;
        data += written;
        length -= (size_t)written;
    }
    return true;
}

/* Copy what is there, `most` at most. */
static void copy(struct stream *stream, size_t most)
{
    ssize_t got = read(stream->from, text, most < sizeof text ? most : sizeof text);
    if (got > 0) {
        (void)write_all(stream->to, text, (size_t)got);
    } else if (got == 0 || (errno != EAGAIN && errno != EINTR)) {
        (void)close(stream->from);
        stream->from = -1;
    }
}

static void copy_what_is_there(struct stream *stream)
{
    int left = 0;
    if (stream->from < 0 || ioctl(stream->from, FIONREAD, &left) != 0)
        return;
    while (left > 0 && stream->from >= 0) {
        size_t most = (size_t)left < sizeof text ? (size_t)left : sizeof text;
        copy(stream, most);
        left -= (int)most;
    }
}

static int take_script(void)
{
    int script = memfd_create("command", MFD_CLOEXEC);
    if (script < 0)
        fail("keep the text");
    for (;;) {
        ssize_t got = read(0, text, sizeof text);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            fail("read the text");
        if (got == 0)
            break;
        if (!write_all(script, text, (size_t)got))
            fail("keep the text");
    }
    if (!write_all(script, "\n", 1))
        fail("keep the text");
    return script;
}

/* Its pipes come a moment after the host itself, and nothing tells when. */
static int open_of(pid_t host_pid, int number, int flags)
{
    const struct timespec pause = {.tv_nsec = 2 * 1000 * 1000};
    char path[64];
    (void)snprintf(path, sizeof path, "/proc/%d/fd/%d", host_pid, number);
    int fd = open(path, flags | O_NONBLOCK | O_CLOEXEC);
    for (int i = 0; fd < 0 && errno == ENOENT && i < OPEN_TRIES_MAX && kill(host_pid, 0) == 0; i++) {
        (void)nanosleep(&pause, NULL);
        fd = open(path, flags | O_NONBLOCK | O_CLOEXEC);
    }
    if (fd < 0)
        fail("reach the shell");
    return fd;
}

static void draw_token(void)
{
    unsigned char drawn[TOKEN_CHARS / 2];
    if (getrandom(drawn, sizeof drawn, 0) != (ssize_t)sizeof drawn)
        fail("draw a token");
    for (size_t i = 0; i < sizeof drawn; i++)
        (void)snprintf(token + 2 * i, 3, "%02x", drawn[i]);
}

static void ask_for_report(int control, pid_t host_pid)
{
    char line[512];
    int length = snprintf(line,
                          sizeof line,
                          "{ \\command echo \"%s $? $$\"; \\command export -p; \\command echo \"%s\"; } "
                          ">>/proc/%d/fd/%d 2>/dev/null\n",
                          token,
                          token,
                          host_pid,
                          HOST_REPORT_WRITE);
    (void)write_all(control, line, (size_t)length);
}

/* The report, if all of it is in: status, pid of the shell, and what lies between its first and last line. */
static bool parse_report(int *status, int *shell, const char **exports, size_t *exports_bytes)
{
    char last[TOKEN_CHARS + 3];
    report[report_bytes] = '\0';
    char *first = strstr(report, token);
    if (first == NULL || sscanf(first + TOKEN_CHARS, " %d %d", status, shell) != 2)
        return false;
    char *line_end = strchr(first, '\n');
    if (line_end == NULL || *status < 0 || *status > 255)
        return false;
    (void)snprintf(last, sizeof last, "\n%s\n", token);
    char *end = strstr(line_end, last);
    if (end == NULL)
        return false;
    *exports = line_end + 1;
    *exports_bytes = end > line_end ? (size_t)(end - line_end) : 0;
    return true;
}

static void read_report(int fd)
{
    /* A report that is too long, or stale ones: the beginning of the last is what counts. */
    if (report_bytes >= sizeof report - 1) {
        report_cut = true;
        char *first = strstr(report, token);
        size_t kept = first == NULL ? 0 : 2 * TOKEN_CHARS;
        memmove(report, first == NULL ? report : first, kept);
        size_t tail = TOKEN_CHARS + 2;
        memmove(report + kept, report + report_bytes - tail, tail);
        report_bytes = kept + tail;
    }
    ssize_t got = read(fd, report + report_bytes, sizeof report - 1 - report_bytes);
    if (got > 0) {
        for (size_t i = report_bytes; i < report_bytes + (size_t)got; i++)
            if (report[i] == '\0')
                report[i] = '?';
        report_bytes += (size_t)got;
    }
}

static void hand_out_state(int shell, const char *exports, size_t exports_bytes)
{
    char path[64];
    char cwd[PATH_MAX];
    (void)snprintf(path, sizeof path, "/proc/%d/cwd", shell);
    ssize_t length = readlink(path, cwd, sizeof cwd);
    uint32_t cwd_bytes = length < 0 ? 0 : (uint32_t)length;
    (void)write_all(0, (const char *)&cwd_bytes, sizeof cwd_bytes);
    (void)write_all(0, cwd, cwd_bytes);
    if (!report_cut)
        (void)write_all(0, exports, exports_bytes);
}

static void copy_until_the_end(void)
{
    while (streams[0].from >= 0 || streams[1].from >= 0) {
        struct pollfd polled[2] = {{streams[0].from, POLLIN, 0}, {streams[1].from, POLLIN, 0}};
        if (poll(polled, 2, -1) < 0 && errno != EINTR)
            return;
        for (size_t i = 0; i < 2; i++)
            if (streams[i].from >= 0 && polled[i].revents != 0)
                copy(&streams[i], sizeof text);
    }
}

static int end_run(int status)
{
    for (size_t i = 0; i < 2; i++) {
        (void)close(streams[i].writer);
        copy_what_is_there(&streams[i]);
        copy(&streams[i], 1); /* nothing more: is it the end? */
    }
    if (streams[0].from < 0 && streams[1].from < 0)
        return status;
    if (fork() == 0) {
        (void)close(0);
        copy_until_the_end();
        return 0;
    }
    return status;
}

/*
 * After an interrupt the shell is asked more than once: dash drops what it has read when it takes the signal, which an
 * idle one does only with the next line. For the same reason the answer to an order counts only when the shell, with
 * another token, has answered once more: no signal is then left to fall on the next run.
 */
static bool ordered;
static int asks_left;

/*
 * A text may interrupt its own shell, and nobody hears of it. Where dash and busybox have read the line that asks for
 * the report together with the first one, they then drop it. So whenever the pipe is empty, one more is put there; under
 * bash, who reads no further than it must, it never is. If nothing was dropped, it is answered after the run, with a
 * token that is nobody's any more.
 */
static int look_in_ms = LOOK_FIRST_MS;

static void look(int control, pid_t host_pid)
{
    int unread = 0;
    if (ioctl(control, FIONREAD, &unread) == 0 && unread == 0) {
        ask_for_report(control, host_pid);
        look_in_ms = LOOK_FIRST_MS;
    } else if (look_in_ms < LOOK_LAST_MS) {
        look_in_ms *= 2;
    }
}

static void obey(uint32_t signo, int control, pid_t host_pid, const struct process *own)
{
    if (signo == SIGTERM)
        (void)signal_run(host_pid, own, SIGTERM);
    else if (signo == SIGUSR1)
        kill_run(host_pid, own);
    interrupt(host_pid);
    ask_for_report(control, host_pid);
    ordered = true;
    asks_left = ASKS_MAX;
}

static int follow_run(int control, int reports, int orders, pid_t host_pid, int host_fd, const struct process *own)
{
    enum { ORDERS, REPORT, HOST, OUT, ERR, POLLED };
    int first_status = -1;
    for (;;) {
        struct pollfd polled[POLLED] = {
            [ORDERS] = {orders, POLLIN, 0},
            [REPORT] = {reports, POLLIN, 0},
            [HOST] = {host_fd, POLLIN, 0},
            [OUT] = {streams[0].from, POLLIN, 0},
            [ERR] = {streams[1].from, POLLIN, 0},
        };
        int woken = poll(polled, POLLED, asks_left > 0 ? ASK_AGAIN_MS : look_in_ms);
        if (woken < 0) {
            if (errno == EINTR)
                continue;
            fail("wait");
        }
        if (woken == 0 && asks_left == 0) {
            look(control, host_pid);
        } else if (woken == 0) {
            asks_left--;
            ask_for_report(control, host_pid);
        }
        for (size_t i = 0; i < 2; i++)
            if (streams[i].from >= 0 && polled[OUT + i].revents != 0)
                copy(&streams[i], sizeof text);
        if (polled[ORDERS].revents != 0) {
            struct signalfd_siginfo order;
            if (read(orders, &order, sizeof order) == (ssize_t)sizeof order)
                obey(order.ssi_signo, control, host_pid, own);
        }
        if (polled[REPORT].revents & POLLIN) {
            int status = 0;
            int shell = 0;
            const char *exports = NULL;
            size_t exports_bytes = 0;
            read_report(reports);
            if (parse_report(&status, &shell, &exports, &exports_bytes)) {
                if (first_status < 0)
                    first_status = status;
                if (ordered) {
                    ordered = false;
                    asks_left = ASKS_MAX;
                    report_bytes = 0;
                    draw_token();
                    ask_for_report(control, host_pid);
                    continue;
                }
                hand_out_state(shell, exports, exports_bytes);
                return end_run(first_status);
            }
        } else if (polled[HOST].revents != 0) {
            for (size_t i = 0; i < 2; i++)
                copy_what_is_there(&streams[i]);
            (void)signal(SIGABRT, SIG_DFL);
            abort();
        }
    }
}

static int run(pid_t host_pid)
{
    struct process own;
    char name[32];
    char line[512];
    sigset_t taken;
    (void)signal(SIGPIPE, SIG_IGN);
    (void)sigemptyset(&taken);
    (void)sigaddset(&taken, SIGINT);
    (void)sigaddset(&taken, SIGTERM);
    (void)sigaddset(&taken, SIGUSR1);
    (void)sigprocmask(SIG_BLOCK, &taken, NULL);
    int orders = signalfd(-1, &taken, SFD_CLOEXEC);
    int host_fd = (int)syscall(SYS_pidfd_open, host_pid, 0);
    (void)snprintf(name, sizeof name, "%d", getpid());
    if (orders < 0 || host_fd < 0 || !read_process(name, &own))
        fail("reach the shell");
    int script = take_script();
    draw_token();
    for (size_t i = 0; i < 2; i++) {
        int ends[2];
        if (pipe2(ends, O_CLOEXEC) != 0 || fcntl(ends[0], F_SETFL, O_NONBLOCK) != 0)
            fail("make a pipe");
        streams[i].from = ends[0];
        streams[i].writer = ends[1];
    }
    int control = open_of(host_pid, HOST_CONTROL, O_WRONLY);
    int reports = open_of(host_pid, HOST_REPORT_READ, O_RDONLY);
    int length = snprintf(line,
                          sizeof line,
                          "\\command . /proc/%d/fd/%d </dev/null >>/proc/%d/fd/%d 2>>/proc/%d/fd/%d\n",
                          own.pid,
                          script,
                          own.pid,
                          streams[0].writer,
                          own.pid,
                          streams[1].writer);
    if (!write_all(control, line, (size_t)length))
        fail("tell the shell");
    ask_for_report(control, host_pid);
    return follow_run(control, reports, orders, host_pid, host_fd, &own);
}

int main(int argc, char **argv)
{
    if ((argc == 3 || argc == 4) && strcmp(argv[1], "open") == 0)
        return host(argv[2]);
    if (argc == 3 && strcmp(argv[1], "run") == 0) {
        char *end = NULL;
        long pid = strtol(argv[2], &end, 10);
        if (*end == '\0' && pid > 1 && pid <= INT_MAX)
            return run((pid_t)pid);
    }
    (void)fputs("usage: sandbox-shell open SHELL [NAME] | run HOST\n", stderr);
    return USAGE;
}
