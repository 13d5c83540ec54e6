"""The program killed, damaged and interrupted over and over: does it keep its promises?"""
