/* Bounded reading and writing of messages; see message.h. */

#define _GNU_SOURCE

#include "message.h"

#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

struct writer out;

static uint64_t take(struct reader *in, size_t width)
{
    uint64_t value = 0;
    if (in->left < width) {
        in->bad = true;
        in->left = 0;
        return 0;
    }
    for (size_t i = 0; i < width; i++)
        value |= (uint64_t)in->at[i] << (8 * i);
    in->at += width;
    in->left -= width;
    return value;
}

uint16_t take_u16(struct reader *in)
{
    return (uint16_t)take(in, 2);
}

uint32_t take_u32(struct reader *in)
{
    return (uint32_t)take(in, 4);
}

uint64_t take_u64(struct reader *in)
{
    return take(in, 8);
}

char *take_string(struct reader *in)
{
    size_t length = take_u32(in);
    unsigned char *text = in->at;
    if (in->bad || in->left == 0 || length > in->left - 1 || memchr(text, 0, length) != NULL || text[length] != 0) {
        in->bad = true;
        in->left = 0;
        return NULL;
    }
    in->at += length + 1;
    in->left -= length + 1;
    return (char *)text;
}

bool complete(const struct reader *in)
{
    return !in->bad && in->left == 0;
}

void begin_message(uint32_t magic, uint32_t type, uint32_t request_id)
{
    out.used = 0;
    put(magic, 2);
    put(type, 2);
    put(request_id, 4);
}

void put(uint64_t value, size_t width)
{
    if (sizeof out.data - out.used < width)
        abort();
    for (size_t i = 0; i < width; i++)
        out.data[out.used++] = (unsigned char)(value >> (8 * i));
}

void put_bytes(const void *data, size_t length)
{
    if (sizeof out.data - out.used < length)
        abort();
    memcpy(out.data + out.used, data, length);
    out.used += length;
}

void put_string(const char *text, size_t length)
{
    put(length, 4);
    put_bytes(text, length);
    put(0, 1);
}

int send_message(int socket_fd, int descriptor, int flags)
{
    struct iovec part = {.iov_base = out.data, .iov_len = out.used};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (descriptor >= 0) {
        memset(&control, 0, sizeof control);
        message.msg_control = &control;
        message.msg_controllen = sizeof control.space;
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(&control.header), &descriptor, sizeof descriptor);
    }
    return sendmsg(socket_fd, &message, flags | MSG_NOSIGNAL) < 0 ? -1 : 0;
}
