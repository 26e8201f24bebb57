/* Reading and writing the messages of init and of the file worker; the tables are in wire.py and files_wire.py. */

#ifndef SANDBOX_MESSAGE_H
#define SANDBOX_MESSAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { OUT_BYTES_MAX = 64 * 1024 };

struct reader {
    unsigned char *at;
    size_t left;
    bool bad; /* sticky: checked once, when everything was taken */
};

uint16_t take_u16(struct reader *in);
uint32_t take_u32(struct reader *in);
uint64_t take_u64(struct reader *in);

/* A string carries its NUL on the wire, outside of its length, so that it can be used where it lies. */
char *take_string(struct reader *in);

/* Whether all of the message was taken, and nothing else. */
bool complete(const struct reader *in);

/* The one message that is being written. */
struct writer {
    unsigned char data[OUT_BYTES_MAX];
    size_t used;
};

extern struct writer out;

void begin_message(uint32_t magic, uint32_t type, uint32_t request_id);
void put(uint64_t value, size_t width);
void put_bytes(const void *data, size_t length);
void put_string(const char *text, size_t length);

/* Sends what `out` holds, with a descriptor unless that is negative. As sendmsg: -1 and errno if it could not. */
int send_message(int socket_fd, int descriptor, int flags);

#endif
